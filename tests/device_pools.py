"""What tests of pools on GPUs share."""

import time
from collections.abc import Callable

import pytest
import torch

from kvstore import cuda
from kvstore.device_segment import DeviceSegment
from kvstore.page_format import PageFormat

MEDIUM = PageFormat(layers=32, kv_heads=8, page_size=16, head_dim=128, dtype="bfloat16")  # 2 MiB


def tensor(segment: DeviceSegment) -> torch.Tensor:
    """uint8 [num_pages, page_bytes]"""
    return torch.as_tensor(segment.pages, device="cuda:0")


def in_the_middle_of_a_copy(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """When half of every page has been copied, `act`; then the rest. Only the timing is changed."""
    copy = cuda.CopyStream.copy

    def copy_in_two_parts(self, sources, targets, size, after=None):
        copy(self, sources, targets, size // 2, after)
        act()
        half = size // 2
        copy(self, [source + half for source in sources], [target + half for target in targets], half)

    monkeypatch.setattr(cuda.CopyStream, "copy", copy_in_two_parts)


def late_write(local: DeviceSegment) -> torch.cuda.Event:
    """A step that was launched before page 3 was freed, and writes to it 2e9 cycles later: about a second."""
    stream = torch.cuda.Stream()
    page = tensor(local)[3]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1)
        page.fill_(0)
        stream.synchronize()  # a kernel's first launch may load it, and wait until the GPU has nothing else to do
        torch.cuda._sleep(2_000_000_000)
        page.fill_(99)
        event = torch.cuda.Event()
        event.record()
    return event


def eventually(holds: Callable[[], bool], within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds()

"""Pages between a GPU's memory and a pool in host memory, as a page store and its workers move them."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from device_pools import MEDIUM, eventually, in_the_middle_of_a_copy, late_write, tensor
from kvstore import cuda
from kvstore.device_segment import DeviceSegment
from kvstore.segment import Segment
from kvstore.transports import base, registry
from kvstore.transports.base import PageReader
from kvstore_owner import SMALL, Owner, random_page
from protos import errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OLD, NEW = 11, 22
TIMEOUT_S = 20.0
Local = Segment | DeviceSegment


class Way:
    """One of the two directions: who owns the pages, and what the reader copies them into."""

    def __init__(self, transport: str, owner_on: int | None) -> None:
        self.transport = transport
        self.owner = Owner(MEDIUM, num_pages=40, device=owner_on)
        self.to_gpu = owner_on is None

    def local(self) -> Local:
        return (DeviceSegment if self.to_gpu else Segment).create(MEDIUM, 40, incarnation=1)

    def connect(self, local: Local) -> PageReader:
        return registry.connect(self.owner.source(self.transport), local, [self.transport])


@pytest.fixture(scope="module", params=[("shm", None), ("cuda_ipc", 0)], ids=["host to GPU", "GPU to host"])
def shared_way(request: pytest.FixtureRequest) -> Iterator[Way]:
    way = Way(*request.param)
    with way.owner:
        yield way


@pytest.fixture
def way(shared_way: Way) -> Iterator[Way]:
    yield shared_way
    shared_way.owner.reset()


@pytest.fixture
def local(way: Way) -> Iterator[Local]:
    segment = way.local()
    yield segment
    segment.close()


@pytest.fixture
def reader(way: Way, local: Local) -> Iterator[PageReader]:
    reader = way.connect(local)
    yield reader
    reader.close()


def fill(local: Local, value: int) -> None:
    if isinstance(local, DeviceSegment):
        tensor(local)[:] = value
        torch.cuda.synchronize()
    else:
        local.pages[:] = value


def page(local: Local, number: int) -> np.ndarray:
    """uint8 [page_bytes]"""
    return tensor(local)[number].cpu().numpy() if isinstance(local, DeviceSegment) else local.pages[number]


def test_scattered_pages_arrive_where_they_should(way, local, reader):
    seeds = list(range(36))  # more than one piece of pinned memory
    refs = way.owner.fill_random(*seeds)
    rng = np.random.default_rng(0)
    chosen, into = rng.permutation(36)[:29].tolist(), rng.permutation(40)[:29].tolist()
    fill(local, 99)
    assert reader.name == way.transport
    assert reader.pull([refs[i] for i in chosen], into, TIMEOUT_S) == 29 * MEDIUM.page_bytes
    for i, number in zip(chosen, into, strict=True):
        assert (page(local, number) == random_page(seeds[i], MEDIUM)).all()
    for untouched in set(range(40)) - set(into):
        assert (page(local, untouched) == 99).all()
    assert reader.pull([], [], TIMEOUT_S) == 0


def test_a_page_that_was_freed_before_is_stale_and_the_reader_goes_on(way, local, reader):
    first, second = way.owner.fill(OLD, OLD)
    way.owner.rewrite(first[0], NEW)
    with pytest.raises(errors.StalePage):
        reader.pull([second, first], [0, 1], TIMEOUT_S)
    [third] = way.owner.fill(NEW)
    reader.pull([second, third], [0, 1], TIMEOUT_S)
    assert (page(local, 0) == OLD).all()
    assert (page(local, 1) == NEW).all()


def test_a_page_rewritten_during_the_copy_is_stale(way, local, reader, monkeypatch):
    [ref] = way.owner.fill(OLD)
    in_the_middle_of_a_copy(monkeypatch, lambda: way.owner.rewrite(ref[0], NEW))
    with pytest.raises(errors.StalePage, match="was freed meanwhile"):
        reader.pull([ref], [1], TIMEOUT_S)
    assert page(local, 1)[[0, -1]].tolist() == [OLD, NEW]  # it really was torn


def test_only_the_fence_stands_between_a_torn_page_and_the_caller(way, local, reader, monkeypatch):
    """The same without the check: this is what the test above would miss if it could not fail."""
    [ref] = way.owner.fill(OLD)
    in_the_middle_of_a_copy(monkeypatch, lambda: way.owner.rewrite(ref[0], NEW))
    monkeypatch.setattr(base, "check_generations", lambda refs, found: None)
    reader.pull([ref], [1], TIMEOUT_S)
    assert page(local, 1)[[0, -1]].tolist() == [OLD, NEW]


def test_whatever_the_moment_a_pull_that_succeeds_has_the_right_bytes(way, local, reader):
    right = 0
    for value in range(1, 101):
        refs = way.owner.fill_and_rewrite_soon([value] * 8, within_s=(value % 5) / 1000)
        with suppress(errors.StalePage):
            reader.pull(refs, list(range(8)), TIMEOUT_S)
            assert all((page(local, number) == value).all() for number in range(8))
            right += 1
    assert right


def test_a_killed_owner_is_lost_and_its_memory_is_let_go():
    for transport, owner_on in (("shm", None), ("cuda_ipc", 0)):
        way = Way(transport, owner_on)
        with way.owner:
            local = way.local()
            before = mapped_bytes()
            reader = way.connect(local)
            refs = way.owner.fill(OLD)
            reader.pull(refs, [0], TIMEOUT_S)
            assert mapped_bytes() > before
            way.owner.kill()
            started = time.monotonic()
            with pytest.raises(errors.WorkerLost, match="gone"):
                reader.pull(refs, [1], TIMEOUT_S)
            assert time.monotonic() - started < 5
            assert mapped_bytes() == before
            with pytest.raises(errors.WorkerLost):
                reader.pull(refs, [1], TIMEOUT_S)
            with pytest.raises(errors.WorkerLost, match=f"owner cannot be reached: {transport}: "):
                way.connect(local)
        assert (page(local, 0) == OLD).all()
        local.close()


def mapped_bytes() -> int:
    """Of pools, by this process: a mapping keeps a dead owner's memory."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:diptych-pages" in line:
            start, end = line.split()[0].split("-")
            total += int(end, 16) - int(start, 16)
    return total


def test_a_killed_owners_gpu_memory_comes_back():
    local = Segment.create(MEDIUM, 2, incarnation=1)
    with Owner(MEDIUM, num_pages=4096, device=0) as owner:  # 8 GiB: other programs may use this GPU too
        refs = owner.fill(OLD)
        reader = registry.connect(owner.source("cuda_ipc"), local, ["cuda_ipc"])
        reader.pull(refs, [0], TIMEOUT_S)
        owner.kill()
        time.sleep(1.0)
        held = torch.cuda.mem_get_info()[0]
        with pytest.raises(errors.WorkerLost, match="gone"):
            reader.pull(refs, [1], TIMEOUT_S)
        assert eventually(lambda: torch.cuda.mem_get_info()[0] > held + (5 << 30))
    local.close()


def test_two_readers_fill_one_pool_and_a_closed_one_can_come_back(way, local, reader):
    [first, second] = way.owner.fill(OLD, NEW)
    other = way.connect(local)
    reader.pull([first], [0], TIMEOUT_S)
    other.pull([second], [1], TIMEOUT_S)
    other.close()
    other = way.connect(local)
    other.pull([second], [2], TIMEOUT_S)
    reader.pull([first], [3], TIMEOUT_S)
    assert [int(page(local, number)[5]) for number in range(4)] == [OLD, NEW, NEW, OLD]
    other.close()


def test_a_pull_waits_for_the_steps_that_may_still_write_to_its_pages():
    with Owner(MEDIUM, num_pages=4) as owner:
        local = DeviceSegment.create(MEDIUM, 8, incarnation=1)
        reader = registry.connect(owner.source("shm"), local, ["shm"])
        reader.pull(owner.fill(OLD), [3], TIMEOUT_S, after=late_write(local))
        torch.cuda.synchronize()
        assert (page(local, 3) == OLD).all()
        reader.close()
        local.close()


def test_pages_smaller_than_the_systems_go_both_ways():
    with Owner(SMALL, num_pages=8) as host, Owner(SMALL, num_pages=8, device=0) as gpu:
        for owner, transport, kind in ((host, "shm", DeviceSegment), (gpu, "cuda_ipc", Segment)):
            local = kind.create(SMALL, 8, incarnation=1)
            reader = registry.connect(owner.source(transport), local, [transport])
            reader.pull(owner.fill(*range(1, 9)), list(range(8)), TIMEOUT_S)
            assert [int(page(local, number)[-1]) for number in range(8)] == list(range(1, 9))
            reader.close()
            local.close()


def test_memory_that_cannot_be_pinned_is_a_reason_to_take_another_way(monkeypatch, caplog):
    def fail(*_: object, **__: object) -> None:
        raise cuda.CudaError("no more of it can be pinned")

    monkeypatch.setattr("kvstore.pinned_pages.PinnedRange", fail)
    with Owner(MEDIUM, num_pages=2) as owner:
        local = DeviceSegment.create(MEDIUM, 2, incarnation=1)
        reader = registry.connect(owner.source("shm", "tcp"), local, ["shm", "tcp"])
        assert reader.name == "tcp"
        assert "shm: cuda:0 cannot read it: no more of it can be pinned" in reader.passed_over
        reader.close()
        local.close()


STORE = """
import json, sys
from kvstore.page_format import PageFormat
from kvstore.segment import Segment
from kvstore.transports import registry
from protos.v1 import worker_pb2

source = worker_pb2.PageSource.FromString(bytes.fromhex(sys.argv[1]))
refs = json.loads(sys.argv[2])
segment = Segment.create(PageFormat.from_proto(source.format), 8, 1)
reader = registry.connect(source, segment, ["cuda_ipc"])
reader.pull([tuple(ref) for ref in refs], list(range(len(refs))), 20.0)
print([int(segment.pages[page][-1]) for page in range(len(refs))], "torch" in sys.modules)
"""


def test_a_process_without_torch_pulls_from_a_gpu():
    with Owner(MEDIUM, num_pages=8, device=0) as owner:
        refs = owner.fill(*range(1, 9))
        arguments = [owner.source("cuda_ipc").SerializeToString().hex(), str([list(ref) for ref in refs])]
        run = subprocess.run([sys.executable, "-c", STORE, *arguments], capture_output=True, text=True, timeout=60)
    assert run.stdout == "[1, 2, 3, 4, 5, 6, 7, 8] False\n", run.stderr

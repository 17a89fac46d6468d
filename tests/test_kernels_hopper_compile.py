"""The Hopper kernels compile for their GPU, without one, as their launchers launch them, and spill no register."""

import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from kernels.hopper_decode import DecodeSchedule, decode_arguments
from kernels.hopper_decode_kernel import decode_kernel, plan_kernel
from kernels.hopper_prefill import prefill_arguments
from kernels.hopper_prefill_kernel import prefill_kernel
from kernels.hopper_tiles import PrefillTiles, deal, make_tiles

SHARED_MEMORY = 227 * 1024  # bytes a program can have
BARRIERS_OF_OURS = 5  # named barriers from this number on are the prefill kernel's own


class HopperDriver:
    """Enough of a driver to compile with."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compile_kernel(monkeypatch, tmp_path) -> Callable[..., Any]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", HopperDriver())
    return lambda kernel, arguments, constants: kernel.warmup(*arguments, grid=(132,), **constants)


def check(compiled: Any, tmp_path) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY
    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+)", usage) == ["0"]
    assert re.findall(r"LOCAL:(\d+)", usage) == ["0"]


@pytest.mark.parametrize(
    ("d", "page_size", "heads", "kv_heads", "seqs"),
    [(128, 64, 32, 8, 1), (128, 64, 32, 8, 8), (64, 16, 9, 3, 8)],
)
def test_decode(compile_kernel, tmp_path, d, page_size, heads, kv_heads, seqs):
    q = torch.zeros(seqs, heads, d, dtype=torch.bfloat16)
    cache = torch.zeros(8, 2, 2, kv_heads, page_size, d, dtype=torch.bfloat16)
    table = torch.zeros(seqs, 32, dtype=torch.int32)
    schedule = DecodeSchedule(torch.ones(seqs, dtype=torch.int32), heads, kv_heads, d)
    lse = torch.zeros(seqs, heads)
    arguments, constants = decode_arguments(q, cache, 1, table, schedule, torch.zeros_like(q), lse, seqs == 1)
    check(compile_kernel(decode_kernel, arguments, constants), tmp_path)


def test_decode_plan(compile_kernel, tmp_path):
    schedule = DecodeSchedule(torch.ones(4, dtype=torch.int32), 8, 2, 128)
    arguments = (schedule.context_lens, schedule.plan, 4, 132)
    check(compile_kernel(plan_kernel, arguments, {"KV_HEADS": 2, "SEQS": 16}), tmp_path)


@pytest.mark.parametrize(("d", "page_size", "groups"), [(128, 64, 2), (64, 64, 2), (64, 16, 3)])
def test_prefill(compile_kernel, tmp_path, d, page_size, groups):
    q = torch.zeros(300, 8, d, dtype=torch.bfloat16)
    cache = torch.zeros(16, 2, 2, 2, page_size, d, dtype=torch.bfloat16)
    records, counts = deal(make_tiles([200, 100], [500, 100], page_size, 8, 64 * groups), 4, 132)
    tiles = PrefillTiles(torch.from_numpy(records), torch.from_numpy(counts), groups)
    table = torch.zeros(2, 40, dtype=torch.int32)
    arguments, constants = prefill_arguments(q, cache, 1, table, tiles, torch.zeros_like(q), torch.zeros(300, 8))
    compiled = compile_kernel(prefill_kernel, arguments, constants)
    check(compiled, tmp_path)
    numbered = re.findall(r"(?:bar\.sync|bar\.arrive|barrier\.sync)\s+(\d+)", compiled.asm["ptx"])
    assert numbered  # the compiler's own; ours are in registers
    assert max(map(int, numbered)) < BARRIERS_OF_OURS

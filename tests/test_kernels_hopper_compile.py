"""The Hopper kernels compile for their GPU, without one, as their launchers launch them, and spill no register."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.driver import driver

from kernels.hopper_decode import ALONE, BESIDE, EARLY, LEADING, DecodeSchedule, decode_arguments
from kernels.hopper_decode_kernel import decode_kernel
from kernels.hopper_decode_merge import merge_arguments, merge_parts_kernel
from kernels.hopper_decode_schedule import plan_arguments, plan_kernel
from kernels.hopper_prefill import keys_for, prefill_arguments
from kernels.hopper_prefill_kernel import prefill_kernel
from kernels.hopper_tiles import PrefillTiles, deal, make_tiles
from kernels_offline import HOPPER, OfflineDriver, assert_no_spills

SHARED_MEMORY = 227 * 1024  # bytes a program can have
BARRIERS_OF_OURS = 5  # named barriers from this number on are the prefill kernel's own


@pytest.fixture
def compile_kernel(monkeypatch, tmp_path) -> Callable[..., Any]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", OfflineDriver(HOPPER))
    return lambda kernel, arguments, constants: kernel.warmup(*arguments, grid=(132,), **constants)


def check(compiled: Any, tmp_path) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert_no_spills(compiled, tmp_path)


ONE = torch.ones(1, dtype=torch.int32)
DECODES = [
    pytest.param(128, 64, 32, 8, 1, EARLY, {}, id="one-sequence"),
    pytest.param(128, 64, 32, 8, 8, ALONE, {}, id="many"),
    pytest.param(64, 16, 9, 3, 8, ALONE, {}, id="64-page16"),
    pytest.param(128, 64, 32, 8, 8, EARLY, {"queries": 8}, id="8-queries"),
    pytest.param(128, 64, 28, 4, 8, ALONE, {"queries": 8, "window": 100, "soft_cap": 30.0}, id="8-queries-window-cap"),
    pytest.param(128, 64, 32, 8, 8, EARLY, {"window": 4096}, id="window"),
    pytest.param(128, 64, 32, 8, 8, EARLY, {"soft_cap": 50.0}, id="cap"),
    pytest.param(128, 64, 32, 8, 8, EARLY, {"batch_invariant": True}, id="batch-invariant"),
    pytest.param(128, 64, 32, 8, 4, LEADING, {"queries": 16, "causal": False}, id="cascade-prefix"),
    pytest.param(64, 64, 28, 4, 8, LEADING, {"queries": 9, "causal": False, "soft_cap": 50.0}, id="cascade-prefix-64"),
    pytest.param(128, 64, 32, 8, 64, BESIDE, {"skip": ONE}, id="cascade-suffix"),
    pytest.param(128, 64, 28, 4, 64, BESIDE, {"skip": ONE, "queries": 8}, id="cascade-suffix-8-queries"),
]


def decode_problem(d, page_size, heads, kv_heads, seqs, options):
    schedule = DecodeSchedule(torch.ones(seqs, dtype=torch.int32), heads, kv_heads, d, **options)
    tokens = seqs * schedule.queries
    q = torch.zeros(tokens, heads, d, dtype=torch.bfloat16)
    cache = torch.zeros(8, 2, 2, kv_heads, page_size, d, dtype=torch.bfloat16)
    return q, cache, torch.zeros(seqs, 32, dtype=torch.int32), schedule, torch.zeros(tokens, heads)


@pytest.mark.parametrize(("d", "page_size", "heads", "kv_heads", "seqs", "overlap", "options"), DECODES)
def test_decode(compile_kernel, tmp_path, d, page_size, heads, kv_heads, seqs, overlap, options):
    options = dict(options)
    soft_cap = options.pop("soft_cap", 0.0)
    q, cache, table, schedule, lse = decode_problem(d, page_size, heads, kv_heads, seqs, options)
    out = None if schedule.parts else q.float() if schedule.skip is not None else torch.zeros_like(q)
    lse = None if schedule.parts else lse
    arguments, constants = decode_arguments(q, cache, 1, table, schedule, out, lse, overlap, soft_cap)
    check(compile_kernel(decode_kernel, arguments, constants), tmp_path)


@pytest.mark.parametrize("options", [{"batch_invariant": True, "window": 9}, {"queries": 16, "causal": False}], ids=str)
def test_decode_merge(compile_kernel, tmp_path, options):
    q, _, _, schedule, lse = decode_problem(128, 64, 32, 8, 4, options)
    rest = (q.float(), lse) if not schedule.causal else ()
    arguments, constants = merge_arguments(schedule, torch.zeros_like(q), lse, *rest)
    check(compile_kernel(merge_parts_kernel, arguments, constants), tmp_path)


@pytest.mark.parametrize("options", [{}, {"window": 100, "batch_invariant": True}, {"skip": ONE}], ids=str)
def test_decode_plan(compile_kernel, tmp_path, options):
    schedule = DecodeSchedule(torch.ones(4, dtype=torch.int32), 8, 2, 128, **options)
    check(compile_kernel(plan_kernel, *plan_arguments(schedule)), tmp_path)


@pytest.mark.parametrize(
    ("d", "page_size", "groups", "window", "soft_cap"),
    [
        (128, 64, 2, 0, 0.0),
        (64, 64, 2, 0, 0.0),
        (64, 16, 3, 0, 0.0),
        (96, 64, 2, 0, 0.0),
        (256, 64, 2, 0, 0.0),
        (128, 64, 2, 4096, 0.0),
        (128, 64, 2, 0, 50.0),
        (64, 64, 2, 128, 0.0),
        (64, 16, 3, 4096, 50.0),
        (256, 128, 2, 4096, 50.0),
    ],
)
def test_prefill(compile_kernel, tmp_path, d, page_size, groups, window, soft_cap):
    q = torch.zeros(300, 8, d, dtype=torch.bfloat16)
    cache = torch.zeros(16, 2, 2, 2, page_size, d, dtype=torch.bfloat16)
    keys = keys_for(d)
    records, counts = deal(make_tiles([200, 100], [500, 100], page_size, 8, 64 * groups, keys, window), 4, 132)
    tiles = PrefillTiles(torch.from_numpy(records), torch.from_numpy(counts), groups, keys)
    table = torch.zeros(2, 40, dtype=torch.int32)
    lse = torch.zeros(300, 8)
    arguments, constants = prefill_arguments(q, cache, 1, table, tiles, torch.zeros_like(q), lse, window, soft_cap)
    compiled = compile_kernel(prefill_kernel, arguments, constants)
    check(compiled, tmp_path)
    numbered = re.findall(r"(?:bar\.sync|bar\.arrive|barrier\.sync)\s+(\d+)", compiled.asm["ptx"])
    assert numbered  # the compiler's own; ours are in registers
    assert max(map(int, numbered)) < BARRIERS_OF_OURS

"""A graph's tiles are those of the chunks, in a frame of fixed size."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kernels.attention_plan import AttentionPlan
from kernels.hopper_tiles import PrefillTiles
from kernels.prefill_plan import PrefillPlan

HEADS, KV_HEADS, D, PAGE = 8, 2, 128, 64
QUERIES, CONTEXTS = [300, 64, 5], [300, 200, 900]


def make_plan(programs=132, rounds=4, columns=16):
    i32 = torch.int32
    table = torch.zeros(4, columns, dtype=i32)
    return PrefillPlan(table, torch.zeros(programs, rounds, 8, dtype=i32), torch.zeros(programs, dtype=i32), PAGE)


def test_the_tiles_are_those_of_a_step_of_its_own():
    plan = make_plan()
    records, counts = plan.tiles(QUERIES, CONTEXTS, HEADS, KV_HEADS, D)
    assert records.shape == plan.records.shape
    starts = torch.tensor([0, 300, 364, 369], dtype=torch.int32)
    lengths = torch.tensor(CONTEXTS, dtype=torch.int32)
    step = AttentionPlan(plan.page_table[:3], starts, lengths, 0, PAGE)
    expected = PrefillTiles.of(step, HEADS, KV_HEADS, groups=2, keys=128, window=0)
    programs, rounds, _ = expected.records.shape
    assert np.array_equal(records[:programs, :rounds], expected.records.numpy())
    assert np.array_equal(counts[:programs], expected.counts.numpy())
    assert not counts[programs:].any()


def test_chunks_without_room_are_refused():
    assert make_plan(programs=4, rounds=2).tiles(QUERIES, CONTEXTS, HEADS, KV_HEADS, D) is None

"""The sampling kernels draw what their twins do, bit for bit. Run by test_kernels_interpreter.py."""

import pytest
import torch
import triton
import triton.language as tl

from kernels import philox
from kernels.sample import sample_torch, sample_triton, weigh
from kernels.sample_log_probs import log_probs_torch, log_probs_triton
from kernels.sample_scale import STEP_BITS
from kernels.sample_steps import uniform
from kernels.sample_steps import weigh as weigh_kernel
from sample_cases import LOGITS, mixed_rows


@pytest.mark.parametrize(("vocab", "dtype"), [(5000, torch.float32), (2049, torch.bfloat16)])
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # by logits of +inf
def test_sample(kind, vocab, dtype):
    logits = LOGITS[kind](9, vocab, seed=vocab).to(dtype)
    own, twin = (mixed_rows(9, vocab, seed=4) for _ in range(2))
    assert sample_triton(logits, own).tolist() == sample_torch(logits, twin).tolist()
    assert torch.equal(own.counts, twin.counts)


def test_one_token():
    rows = mixed_rows(6, 1, seed=4)
    assert sample_triton(torch.zeros(6, 1), rows).tolist() == [0] * 6


def test_a_row_is_alone():
    logits, rows = LOGITS["normal"](20, 5000, seed=1), mixed_rows(20, 5000, seed=2)
    before = rows.counts.clone()
    ids = sample_triton(logits, rows).tolist()
    rows.counts.copy_(before)
    for count in (1, 7):  # other copies of the histogram
        assert sample_triton(logits[:count], rows.first(count)).tolist() == ids[:count]
        rows.counts.copy_(before)


@pytest.mark.parametrize("top", [0, 1, 20])
@pytest.mark.parametrize("kind", ["normal", "tied", "equal"])
def test_log_probs(kind, top):
    logits, ids = LOGITS[kind](3, 5000, seed=3), torch.tensor([0, 4999, 77])
    out, expected = log_probs_triton(logits, ids, top), log_probs_torch(logits, ids, top)
    assert torch.equal(out[1], expected[1])
    torch.testing.assert_close((out[0], out[2]), (expected[0], expected[2]), atol=2e-6, rtol=2e-6)


@triton.jit
def _uniforms(seeds_ptr, positions_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, uniform(tl.load(seeds_ptr + i), tl.load(positions_ptr + i)))


def test_uniform_is_that_of_the_engine():
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (64,), generator=generator)
    positions = torch.randint(0, 2**40, (64,), generator=generator)
    out = torch.zeros(64, dtype=torch.float64)
    _uniforms[(1,)](seeds, positions, out, BLOCK=64)
    assert torch.equal(out, philox.uniform(seeds, positions))


@triton.jit
def _weights(steps_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, weigh_kernel(tl.load(steps_ptr + i)))


def test_weights_are_those_of_the_twin():
    steps = torch.randint(0, 64 << STEP_BITS, (4096,), generator=torch.Generator().manual_seed(0))
    out = torch.zeros(4096, dtype=torch.int64)
    _weights[(1,)](steps.int(), out, BLOCK=4096)
    assert torch.equal(out, weigh(steps))

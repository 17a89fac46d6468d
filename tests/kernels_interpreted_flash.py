"""FlashAttention's kernels against dense attention in float64. Run by test_kernels_interpreter.py."""

import pytest
import torch

from kernels.flash_attention import attention_torch, flash_attention_triton, keep_mask

SHAPES = [  # batch, heads, kv_heads, queries, keys, d
    (2, 4, 2, 40, 40, 16),
    (1, 3, 1, 5, 66, 40),
    (1, 2, 2, 65, 33, 64),
    (1, 1, 1, 1, 1, 8),
]


def inputs(shape):
    batch, heads, kv_heads, queries, keys, d = shape
    generator = torch.Generator().manual_seed(queries)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (torch.randn(batch, *size, d, generator=generator).requires_grad_() for size in sizes)
    return q, k, v, torch.randn(batch, heads, queries, d, generator=generator)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_dense_attention(shape, causal, dropout_p):
    *leaves, grad = inputs(shape)
    out = flash_attention_triton(*leaves, causal=causal, dropout_p=dropout_p, seed=2**63 + 5, offset=7)
    keep = keep_mask((*shape[:2], *shape[3:5]), dropout_p, 2**63 + 5, 7) if dropout_p else None
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = attention_torch(*exact, causal=causal, keep=keep, dropout_p=dropout_p)
    torch.testing.assert_close(out.double(), expected, atol=5e-6, rtol=5e-6)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.filterwarnings("ignore:Input")  # that float32 may be too coarse: hence the wide steps
def test_gradients_are_those_of_finite_differences(dropout_p):
    q, k, v, _ = inputs((1, 2, 1, 3, 4, 4))

    def attend(*leaves):
        return flash_attention_triton(*leaves, causal=True, dropout_p=dropout_p, seed=1)

    assert torch.autograd.gradcheck(attend, (q, k, v), eps=1e-2, atol=1e-3, rtol=1e-3, fast_mode=True)


def test_dropout_is_a_matter_of_seed_and_offset():
    q, k, v, _ = inputs((1, 2, 2, 32, 32, 16))
    first, again, seed, offset = (
        flash_attention_triton(q, k, v, dropout_p=0.5, seed=seed, offset=offset)
        for seed, offset in ((9, 0), (9, 0), (10, 0), (9, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, seed)
    assert not torch.equal(first, offset)

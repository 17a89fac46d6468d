"""On the device: as near to float64 as dense attention in the same type, forward and backward, dropout included."""

import pytest
import torch

from kernels.flash_attention import attention_torch, flash_attention, keep_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch says this of the first backward in a process, which runs in a thread of its own.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

SHAPES = [  # batch, heads, kv_heads, queries, keys, d
    (2, 8, 2, 300, 300, 128),
    (1, 9, 3, 65, 200, 64),
    (2, 2, 2, 129, 64, 96),
    (1, 4, 1, 77, 77, 256),
    (1, 1, 1, 1, 1, 16),
]


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def results(attend, q, k, v, grad):
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_torch(shape, causal, dropout_p, dtype):
    batch, heads, kv_heads, queries, keys, d = shape
    generator = torch.Generator("cuda").manual_seed(queries)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries))
    q, k, v, grad = (torch.randn(batch, *size, d, generator=generator, device="cuda").to(dtype) for size in sizes)
    keep = keep_mask((batch, heads, queries, keys), dropout_p, 99, 3).cuda() if dropout_p else None

    def dense(*inputs):
        return attention_torch(*inputs, causal=causal, keep=keep, dropout_p=dropout_p)

    def ours(*inputs):
        return flash_attention(*inputs, causal=causal, dropout_p=dropout_p, seed=99, offset=3)

    exact = results(dense, *leaves(q.double(), k.double(), v.double()), grad.double())
    plain = results(dense, *leaves(q, k, v), grad)
    for out, reference, theirs in zip(results(ours, *leaves(q, k, v), grad), exact, plain, strict=True):
        assert out.dtype == dtype
        least = 1e-2 if dtype == torch.bfloat16 else 2e-5  # where torch's own rounding happens to vanish
        size = reference.abs().max().clamp(min=1.0)  # gradients that should vanish are sums of numbers about 1
        allowed = 2 * (theirs - reference).abs().max() + least * size
        assert (out - reference).abs().max() <= allowed


def test_the_same_seed_drops_the_same():
    q, k, v = (torch.randn(1, 2, 200, 64, device="cuda") for _ in range(3))
    first, again, other = (flash_attention(q, k, v, dropout_p=0.5, seed=seed) for seed in (2**64 - 1, 2**64 - 1, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

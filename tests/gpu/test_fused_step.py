"""The small kernels of a step on a CUDA device, against their twins in float32, also with dependent launches."""

import pytest
import torch
import torch.nn.functional as F

from kernels.embedding import embedding, embedding_torch
from kernels.linear import linear
from kernels.page_write import page_write
from kernels.qkv_to_pages import qkv_to_pages, qkv_to_pages_torch
from kernels.rms_norm import rms_norm, rms_norm_residual
from kernels.rope import rope, rope_tables
from kernels.silu_mul import silu_mul, silu_mul_torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16 = torch.bfloat16
EPS = 1e-5
STEP = 2.0**-8  # of bfloat16


def rows(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(BF16)


def close(out: torch.Tensor, wide: torch.Tensor, steps: float = 1.0) -> None:
    """Within so many rounding steps of the float32 result."""
    assert out.dtype == BF16
    torch.testing.assert_close(out.float(), wide, atol=steps * STEP * 1e-2, rtol=steps * STEP)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("hidden", [576, 3584, 4096, 8192])
@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm(hidden, tokens, scale, overlap):
    x, residual, w = rows(tokens, hidden, scale=scale), rows(tokens, hidden, scale=scale), rows(hidden)
    close(rms_norm(x, w, EPS, overlap_previous=overlap), F.rms_norm(x.float(), (hidden,), w.float(), EPS))
    normed, added = rms_norm_residual(x, residual, w, EPS, overlap_previous=overlap)
    assert torch.equal(added, x + residual)
    close(normed, F.rms_norm(added.float(), (hidden,), w.float(), EPS))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ffn", [1536, 14336, 18944])
def test_silu_mul(ffn, overlap):
    gate_up = rows(5, 2 * ffn, scale=8.0)
    close(silu_mul(gate_up, overlap_previous=overlap), silu_mul_torch(gate_up.float()))


@pytest.mark.parametrize("overlap", [False, True])
def test_embedding(overlap):
    table, ids = rows(1000, 3584), torch.tensor([999, 0, 7, 7], device="cuda")
    assert torch.equal(embedding(ids, table, BF16, overlap_previous=overlap), embedding_torch(ids, table, BF16))
    assert torch.equal(embedding(ids, table, torch.float32), table[ids].float())
    assert not embedding(torch.tensor([1000, -1], device="cuda"), table, BF16).any()


def tables(tokens: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rope_tables(10000.0 ** -(torch.arange(0, d, 2, device="cuda") / d), 4096)
    positions = torch.randint(0, 4096, (tokens,), device="cuda")
    return cos[positions], sin[positions]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "page_size"), [(32, 8, 128, 64), (9, 3, 64, 16), (28, 4, 128, 16), (8, 1, 256, 128)]
)
@pytest.mark.parametrize("tokens", [1, 16, 65])
def test_qkv_to_pages(heads, kv_heads, d, page_size, tokens, normed):
    qkv = rows(tokens, heads + 2 * kv_heads, d)
    cos, sin = tables(tokens, d)
    norms = [torch.rand(d, device="cuda").add(0.5).to(BF16) if normed else None for _ in range(2)]
    pages = -(-tokens // page_size) + 1
    slots = torch.randperm(pages * page_size, device="cuda")[:tokens]
    if tokens > 1:
        slots[::3] = -1
    shape = (pages, 3, 2, kv_heads, page_size, d)
    cache, wide = torch.full(shape, torch.nan, device="cuda", dtype=BF16), torch.full(shape, torch.nan)
    q = qkv_to_pages(qkv, cos, sin, *norms, EPS, cache, 1, slots).cpu()
    cpu = [None if t is None else t.cpu().float() for t in (qkv, cos, sin, *norms)]
    expected_q = qkv_to_pages_torch(*cpu, EPS, wide, 1, slots.cpu())
    cache = cache.cpu()
    # A normed head is rounded before it is rotated: both its halves' errors then add up.
    tolerance = {"atol": 8 * STEP if normed else STEP * 1e-2, "rtol": STEP}
    torch.testing.assert_close(q.float(), expected_q, **tolerance)
    torch.testing.assert_close(cache.float(), wide, **tolerance, equal_nan=True)
    assert torch.equal(cache[:, :, 1].isnan(), wide[:, :, 1].isnan())
    assert torch.equal(cache[:, :, 1].nan_to_num().float(), wide[:, :, 1].nan_to_num())


@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_a_layer_of_dependent_launches_in_a_graph(tokens):
    """Every kernel starts before the one in front of it has ended; the result is that of separate steps in a row."""
    heads, kv_heads, d, ffn, hidden = 32, 8, 128, 4096, 4096
    sizes = [((heads + 2 * kv_heads) * d, hidden), (hidden, heads * d), (2 * ffn, hidden), (hidden, ffn)]
    w_qkv, w_out, w_up, w_down = (rows(*size, scale=size[1] ** -0.5) for size in sizes)
    norm, table = rows(hidden), rows(100, hidden)
    cos, sin = tables(tokens, d)
    ids, slots = torch.randint(0, 100, (tokens,), device="cuda"), torch.randperm(64, device="cuda")[:tokens]
    caches = [torch.zeros(1, 8, 2, kv_heads, 64, d, dtype=BF16, device="cuda") for _ in range(2)]

    def layers(overlap: bool) -> torch.Tensor:
        x = embedding(ids, table, BF16, overlap_previous=overlap)
        residual = torch.zeros_like(x)
        for layer in range(8):
            normed, residual = rms_norm_residual(x, residual, norm, EPS, overlap_previous=overlap)
            qkv = linear(normed, w_qkv, overlap_previous=overlap).view(tokens, -1, d)
            if overlap:
                q = qkv_to_pages(qkv, cos, sin, None, None, EPS, caches[1], layer, slots, overlap_previous=True)
            else:
                q, k = rope(qkv[:, :heads], qkv[:, heads:-kv_heads], cos, sin)
                page_write(k, qkv[:, -kv_heads:], caches[0], layer, slots)
            x = linear(q.flatten(1), w_out, overlap_previous=overlap)
            normed, residual = rms_norm_residual(x, residual, norm, EPS, overlap_previous=overlap)
            gate_up = linear(normed, w_up, overlap_previous=overlap)
            x = linear(silu_mul(gate_up, overlap_previous=overlap), w_down, overlap_previous=overlap)
        return x

    layers(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers(True)
    for _ in range(10):
        ids.copy_(torch.randint_like(ids, 100))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, layers(False))
        assert torch.equal(caches[1], caches[0])

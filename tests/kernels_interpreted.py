"""Each Triton kernel equals its twin. Run by test_kernels_interpreter.py, in a process with TRITON_INTERPRET=1.

float32 and float16 only: the interpreter's product of bfloat16 matrices is wrong.
"""

import pytest
import torch

from kernels.attention_plan import AttentionPlan
from kernels.decode_attention import decode_attention_torch, decode_attention_triton
from kernels.embedding import embedding_torch, embedding_triton
from kernels.page_checksum import page_checksum_torch, page_checksum_triton
from kernels.page_copy import page_gather, page_gather_triton, page_scatter, page_scatter_triton
from kernels.page_write import page_write_torch, page_write_triton
from kernels.prefill_attention import prefill_attention_torch, prefill_attention_triton
from kernels.qkv_to_pages import qkv_to_pages_torch, qkv_to_pages_triton
from kernels.resident_rows import (
    advance_rows_torch,
    advance_rows_triton,
    row_places_torch,
    row_places_triton,
)
from kernels.rms_norm import rms_norm_torch, rms_norm_triton
from kernels.rope import rope_tables, rope_torch, rope_triton
from kernels.silu_mul import silu_mul_torch, silu_mul_triton
from kernels_oracle import Case, make_case

HALF = torch.float16
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (HALF, 4e-3)], ids=["fp32", "fp16"])
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        {"heads": 6, "kv_heads": 2, "head_dim": 64, "page_size": 16},
        {"heads": 2, "kv_heads": 2, "head_dim": 96, "page_size": 16},
        {"heads": 4, "kv_heads": 1, "head_dim": 128, "page_size": 128},
    ],
    ids=["6-2-64-page16", "2-2-96-page16", "4-1-128-page128"],
)


def compare(twin, kernel, case: Case, plan: AttentionPlan, tolerance: float, **options) -> None:
    expected_lse, lse = torch.empty(case.q.shape[:2]), torch.full(case.q.shape[:2], torch.nan)
    expected = twin(case.q, case.cache, 1, plan, expected_lse, **options)
    out = kernel(case.q, case.cache, 1, plan, lse, **options)
    assert out.dtype == case.q.dtype
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)
    assert torch.equal(kernel(case.q, case.cache, 1, plan, **options), out)


@SHAPES
@DTYPES
def test_decode_attention(shape, dtype, tolerance):
    size = shape["page_size"]
    contexts = [1, size, size + 1, 4 * size - 1] if size == 16 else [size + 1]
    case = make_case(contexts, [1] * len(contexts), dtype=dtype, **shape)
    compare(decode_attention_torch, decode_attention_triton, case, case.plan(), tolerance)


def test_decode_attention_of_extreme_logits():
    case = make_case([40, 3], [1, 1], heads=3, kv_heads=1, scale=300.0)
    compare(decode_attention_torch, decode_attention_triton, case, case.plan(), 1e-3)


@SHAPES
@DTYPES
def test_prefill_attention(shape, dtype, tolerance):
    size = shape["page_size"]
    contexts, queries = ([size, 70 + size, 2 * size + 1], [size, 70, 3]) if size == 16 else ([size + 1], [5])
    case = make_case(contexts, queries, dtype=dtype, **shape)
    compare(prefill_attention_torch, prefill_attention_triton, case, case.plan(), tolerance)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 40, "soft_cap": 3.0}, {"soft_cap": 0.5}], ids=str)
@DTYPES
def test_prefill_attention_with_options(dtype, tolerance, options):
    case = make_case([16, 230, 33], [16, 150, 3], heads=2, kv_heads=1, dtype=dtype)
    compare(prefill_attention_torch, prefill_attention_triton, case, case.plan(), max(tolerance, 1e-5), **options)


def test_prefill_attention_after_decodes():
    case = make_case([20, 33, 18, 5], [1, 1, 10, 5], heads=3, kv_heads=1)
    chunks = Case(case.q[2:], case.cache, case.page_table, case.contexts, case.queries)
    compare(prefill_attention_torch, prefill_attention_triton, chunks, case.plan(), 3e-6)


@DTYPES
def test_rms_norm(dtype, tolerance):
    x, residual, w = (torch.randn(shape).to(dtype) for shape in ((3, 5, 96), (3, 5, 96), (96,)))
    out, same = rms_norm_triton(x, None, w, 1e-5)
    assert same is x
    torch.testing.assert_close(out, rms_norm_torch(x, w, 1e-5), atol=tolerance, rtol=tolerance)
    out, added = rms_norm_triton(x, residual, w, 1e-5)
    assert torch.equal(added, x + residual)
    torch.testing.assert_close(out, rms_norm_torch(x + residual, w, 1e-5), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("d", [64, 96])
@DTYPES
def test_rope(dtype, tolerance, d):
    fused = torch.randn(4, 15, d).to(dtype)
    q, k = fused[:, :9], fused[:, 9:12]
    cos, sin = (table[[0, 3, 17, 200]] for table in rope_tables(10000.0 ** -(torch.arange(0, d, 2) / d), 256))
    for out, expected in zip(rope_triton(q, k, cos, sin), rope_torch(q, k, cos, sin), strict=True):
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@DTYPES
def test_silu_mul(dtype, tolerance):
    gate_up = (torch.randn(3, 2 * 1100) * 5).to(dtype)
    torch.testing.assert_close(silu_mul_triton(gate_up), silu_mul_torch(gate_up), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("d", [64, 96])
@DTYPES
def test_page_write(dtype, tolerance, d):
    fused = torch.randn(3, 12, d).to(dtype)
    cache, expected = (torch.zeros(4, 2, 2, 3, 16, d, dtype=dtype) for _ in range(2))
    slots = torch.tensor([5, -1, 16])
    page_write_triton(fused[:, 6:9], fused[:, 9:], cache, 1, slots)
    page_write_torch(fused[:, 6:9], fused[:, 9:], expected, 1, slots)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (4, 1, 96), (14, 2, 64)])
@DTYPES
def test_qkv_to_pages(dtype, tolerance, heads, kv_heads, d, normed):
    qkv = torch.randn(4, heads + 2 * kv_heads, d).to(dtype)
    cos, sin = (table[[0, 3, 17, 200]] for table in rope_tables(10000.0 ** -(torch.arange(0, d, 2) / d), 256))
    norms = [torch.randn(d).to(dtype) if normed else None for _ in range(2)]
    cache, expected = (torch.full((4, 2, 2, kv_heads, 16, d), 7.0, dtype=dtype) for _ in range(2))
    slots = torch.tensor([5, -1, 63, 16])
    q = qkv_to_pages_triton(qkv, cos, sin, *norms, 1e-5, cache, 1, slots)
    expected_q = qkv_to_pages_torch(qkv, cos, sin, *norms, 1e-5, expected, 1, slots)
    torch.testing.assert_close(q, expected_q, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(cache, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(cache[:, :, 1], expected[:, :, 1])  # V is copied
    assert torch.equal(cache == 7.0, expected == 7.0)


def test_embedding():
    table, ids = torch.randn(11, 1100), torch.tensor([10, 0, 3, 3])
    for dtype in (torch.float32, HALF):
        assert torch.equal(embedding_triton(ids, table, dtype), embedding_torch(ids, table, dtype))
    assert not embedding_triton(torch.tensor([11, -1]), table, HALF).any()


def test_page_copy():
    flat, pages = torch.randn(5, 2 * 2 * 3 * 16 * 60), torch.tensor([3, 0, 4])
    gathered = page_gather_triton(flat, pages)
    assert torch.equal(gathered, page_gather(flat, pages))
    scattered, expected = torch.zeros_like(flat), torch.zeros_like(flat)
    page_scatter_triton(scattered, pages, gathered)
    page_scatter(expected, pages, gathered)
    assert torch.equal(scattered, expected)


@pytest.mark.parametrize("words", [48, 4096, 2**16 + 5000])  # less than a block, one, and more than one program's
def test_page_checksum(words):
    pool, pages = torch.randint(-(2**31), 2**31, (5, words), dtype=torch.int32), torch.tensor([3, 0, 4])
    assert torch.equal(page_checksum_triton(pool, pages), page_checksum_torch(pool, pages))


@pytest.mark.parametrize("rows", [5, 130])
def test_resident_rows(rows):
    table = torch.randint(0, 50, (rows, 4), dtype=torch.int32)
    lengths = torch.tensor([1, 64, 0, 33, 16], dtype=torch.int32).repeat(26)[:rows]
    for out, expected in zip(row_places_triton(lengths, table, 16), row_places_torch(lengths, table, 16), strict=True):
        assert torch.equal(out, expected)
    tokens, ids = torch.arange(rows), torch.arange(1000, 1000 + rows)
    expected_tokens, expected_lengths = tokens.clone(), lengths.clone()
    advance_rows_triton(tokens, lengths, ids)
    advance_rows_torch(expected_tokens, expected_lengths, ids)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(lengths, expected_lengths)

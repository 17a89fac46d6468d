"""Every plain Triton kernel compiles for an AMD MI300 (gfx942), without one, as its launcher launches it."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernels.decode_attention import decode_attention_triton
from kernels.embedding import embedding_triton
from kernels.flash_attention import flash_attention_triton
from kernels.merge_attention import merge_attention_triton
from kernels.page_checksum import page_checksum_triton
from kernels.page_copy import page_gather_triton, page_scatter_triton
from kernels.page_write import page_write_triton
from kernels.prefill_attention import prefill_attention_triton
from kernels.qkv_to_pages import qkv_to_pages_triton
from kernels.resident_rows import advance_rows_triton, row_places_triton
from kernels.rms_norm import rms_norm_triton
from kernels.rope import rope_triton
from kernels.sample import sample_triton
from kernels.sample_log_probs import log_probs_triton
from kernels.sample_rows import SamplingRows
from kernels.silu_mul import silu_mul_triton
from kernels_offline import GFX942, compile_launches
from kernels_oracle import make_case

BF16 = torch.bfloat16
LOCAL_MEMORY = 64 * 1024  # bytes a program can have
# float32 serves checks; heads wider than 64 would not fit the local memory in it.
HEAD_DIM = {BF16: 128, torch.float32: 64}


def attend(dtype: torch.dtype) -> None:
    for queries, kernel in (([1, 1], decode_attention_triton), ([100, 200], prefill_attention_triton)):
        case = make_case([100, 300], queries, heads=32, kv_heads=8, head_dim=HEAD_DIM[dtype], page_size=64, dtype=dtype)
        kernel(case.q, case.cache, 1, case.plan(), torch.empty(case.q.shape[:2]))
    part, lse = torch.empty(2, 32, 128, dtype=dtype), torch.empty(2, 32)
    merge_attention_triton(part, lse, part, lse, dtype)


def train(dtype: torch.dtype) -> None:
    q, k = (torch.zeros(1, heads, 100, 128, dtype=dtype, requires_grad=True) for heads in (4, 2))
    flash_attention_triton(q, k, k, causal=True, dropout_p=0.1).sum().backward()


def step(dtype: torch.dtype) -> None:
    """Everything of a step that is no attention and no matrix product."""
    ids, table = torch.zeros(3, dtype=torch.int64), torch.empty(100, 4096, dtype=dtype)
    x = embedding_triton(ids, table, dtype)
    rms_norm_triton(x, None, table[0], 1e-5)
    rms_norm_triton(x, x, table[0], 1e-5)
    qkv, norm, angles = torch.empty(3, 48, 128, dtype=dtype), torch.empty(128, dtype=dtype), torch.empty(3, 128)
    rope_triton(qkv[:, :32], qkv[:, 32:40], angles, angles)
    cache = torch.empty(2, 2, 2, 8, 64, 128, dtype=dtype)
    page_write_triton(qkv[:, 32:40], qkv[:, 40:], cache, 1, ids)
    qkv_to_pages_triton(qkv, angles, angles, norm, norm, 1e-5, cache, 1, ids)
    silu_mul_triton(torch.empty(3, 2 * 14336, dtype=dtype))
    flat = cache.view(2, -1)
    page_scatter_triton(flat, ids[:1], page_gather_triton(flat, ids[:1]))
    page_checksum_triton(flat.view(torch.int32), ids[:1])
    lengths, pages = torch.ones(64, dtype=torch.int32), torch.zeros(64, 128, dtype=torch.int32)
    row_places_triton(lengths, pages, 64)
    advance_rows_triton(ids, lengths[:3], ids)


def choose(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 128256, dtype=dtype)
    for entries, counts in ((0, False), (16, True)):
        sample_triton(logits, SamplingRows.neutral(2, 128256, entries, logits.device, counts=counts))
    log_probs_triton(logits, torch.zeros(2, dtype=torch.int64), 20)


PARTS = {"attend": attend, "train": train, "step": step, "choose": choose}


def plain_kernels() -> set[str]:
    """The names of the Triton kernels in kernels/ that are not Hopper's own."""
    return {
        function.name
        for path in (Path(__file__).parent.parent / "kernels").glob("*.py")
        if not path.name.startswith("hopper_")
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef)
        and (function.name.endswith("_kernel") or "TritonKernel" in map(ast.unparse, function.decorator_list))
    }


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> dict[str, list[Any]]:
    monkeypatch.setattr(torch.version, "hip", "7.0")  # as in a build of torch for AMD
    return compile_launches(monkeypatch, tmp_path, GFX942)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("part", PARTS)
def test_compiles_for_gfx942(compiled, part, dtype):
    PARTS[part](dtype)
    assert compiled
    for name, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.asm["hsaco"].startswith(b"\x7fELF"), name
            assert 'amdgcn-amd-amdhsa--gfx942"' in kernel.asm["amdgcn"], name
            assert kernel.metadata.shared <= LOCAL_MEMORY, name


def test_no_kernel_is_left_out(compiled):
    for part in PARTS.values():
        part(BF16)
    assert set(compiled) == plain_kernels()

"""Log-probabilities of sampled tokens, and of the likeliest ones, as the model alone gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.sample_scale import CHUNK, ID_BITS
from kernels.triton_kernel import TritonKernel, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

MAX_TOP = 20


def log_probs(logits: Tensor, ids: Tensor, top: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """logits [rows, vocab] float32 or bfloat16, ids [rows] int64 -> that of each id [rows], the `top` (at most 20)
    likeliest ids [rows, top] int64, of equals the lowest first, and theirs [rows, top]; float32.

    Logits are those of the model, before `sample` changes any. Raises ValueError naming the argument that is wrong.
    """
    rows, vocab = logits.shape
    if logits.dtype not in (torch.float32, torch.bfloat16) or logits.stride(1) != 1 or not 0 < vocab <= 2**ID_BITS:
        raise ValueError(f"logits must be float32 or bfloat16 rows, not {logits.dtype} {tuple(logits.shape)}")
    if ids.shape != (rows,) or ids.dtype != torch.int64 or ids.device != logits.device:
        raise ValueError(f"ids must be int64 {(rows,)} beside logits, not {ids.dtype} {tuple(ids.shape)}")
    if not 0 <= top <= min(MAX_TOP, vocab):
        raise ValueError(f"top is {top}: 0 to {min(MAX_TOP, vocab)} are wanted")
    return log_probs_triton(logits, ids, top) if logits.is_cuda else log_probs_torch(logits, ids, top)


def log_probs_torch(logits: Tensor, ids: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `log_probs_triton`."""
    found = logits.float().log_softmax(-1)
    top_ids = found.sort(dim=-1, descending=True, stable=True).indices[:, :top]
    return found.gather(1, ids[:, None])[:, 0], top_ids, found.gather(1, top_ids)


def log_probs_triton(logits: Tensor, ids: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """A program for (row, 2,048 tokens) finds the sum and the likeliest of these, one a row merges them."""
    rows, vocab = logits.shape
    chunks = -(-vocab // CHUNK)
    sums = logits.new_empty(rows, chunks, 2, dtype=torch.float32)
    best = logits.new_empty(rows, chunks, top, dtype=torch.int64)
    _log_probs_chunk[(rows, chunks)](
        logits, sums, best, vocab, chunks, logits.stride(0), TOP=top, ID_BITS=ID_BITS, CHUNK=CHUNK, num_warps=8
    )
    found = logits.new_empty(rows, dtype=torch.float32)
    top_ids = logits.new_empty(rows, top, dtype=torch.int64)
    top_found = logits.new_empty(rows, top, dtype=torch.float32)
    _log_probs_merge[(rows,)](
        logits,
        ids,
        sums,
        best,
        found,
        top_ids,
        top_found,
        chunks,
        logits.stride(0),
        TOP=top,
        ID_BITS=ID_BITS,
        CHUNKS_BLOCK=next_power_of_2(chunks),
        BEST_BLOCK=next_power_of_2(max(1, chunks * top)),
        num_warps=4,
    )
    return found, top_ids, top_found


@TritonKernel
@no_type_check
def _log_probs_chunk(
    logits_ptr,
    sums_ptr,
    best_ptr,
    vocab,
    chunks,
    logits_stride,
    TOP: tl.constexpr,
    ID_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * logits_stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    peak = tl.max(x)
    part = row * chunks + chunk
    tl.store(sums_ptr + part * 2, peak)
    # Of a chunk without a logit the sum would be NaN.
    total = tl.where(peak > float("-inf"), tl.sum(tl.exp(x - peak)), 0.0)
    tl.store(sums_ptr + part * 2 + 1, total)
    # One number orders tokens by logit, then by id: the bits of a float, turned where it is negative, sort as it does.
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # no -0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    place = (bits.to(tl.int64) << ID_BITS) - token
    for i in range(TOP):
        first = tl.max(place)
        tl.store(best_ptr + part * TOP + i, first)
        place = tl.where(place == first, -(1 << 62), place)


@TritonKernel
@no_type_check
def _log_probs_merge(
    logits_ptr,
    ids_ptr,
    sums_ptr,
    best_ptr,
    found_ptr,
    top_ids_ptr,
    top_found_ptr,
    chunks,
    logits_stride,
    TOP: tl.constexpr,
    ID_BITS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    BEST_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS_BLOCK)
    peaks = tl.load(sums_ptr + (row * chunks + c) * 2, mask=c < chunks, other=float("-inf"))
    sums = tl.load(sums_ptr + (row * chunks + c) * 2 + 1, mask=c < chunks, other=0.0)
    peak = tl.max(peaks)
    lse = peak + tl.log(tl.sum(sums * tl.exp(peaks - peak)))
    x = tl.load(logits_ptr + row * logits_stride + tl.load(ids_ptr + row)).to(tl.float32)
    tl.store(found_ptr + row, x - lse)
    if TOP > 0:
        i = tl.arange(0, BEST_BLOCK)
        best = tl.load(best_ptr + row * chunks * TOP + i, mask=i < chunks * TOP, other=-(1 << 62))
        for j in range(TOP):
            first = tl.max(best)
            best = tl.where(best == first, -(1 << 62), best)
            bits = -(-first >> ID_BITS)  # rounded up: the id was subtracted
            token = (bits << ID_BITS) - first
            bits = bits.to(tl.int32)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            tl.store(top_ids_ptr + row * TOP + j, token)
            tl.store(top_found_ptr + row * TOP + j, bits.to(tl.float32, bitcast=True) - lse)

"""The plain Triton kernels of decode attention: flash decoding (Dao et al. 2023), a part of a context a program."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.capability import dot_precision
from kernels.triton_kernel import TritonKernel, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


_LOG2_E = 1.4426950408889634  # the kernels exponentiate to base 2
# Batch-invariant: parts of so many tokens, or as many times longer that so many parts are enough for a context.
_PART_TOKENS, _PARTS = 512, 32


def decode_split(
    q: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    longest: int,
    window: int = 0,
    soft_cap: float = 0.0,
    batch_invariant: bool = False,
    causal: bool = True,
    skip: Tensor | None = None,
) -> None:
    """The launches of `decode_attention_triton`; lengths are read on the device, so that a CUDA graph can hold them.

    q, out [seqs * queries, heads, d], page_table [seqs, pages], context_lens [seqs] int32 of at most `longest` keys to
    look at; a context of 0 gives zeros and a log-sum-exp of minus infinity. `causal` and `skip` as in `DecodeSchedule`.
    """
    _, layers, _, kv_heads, page_size, d = cache.shape
    tokens, heads, _ = q.shape
    seqs, group = context_lens.shape[0], heads // kv_heads
    queries = tokens // seqs
    if q.stride(2) != 1:
        raise ValueError("q must be contiguous in its last dimension")
    block_g = min(64, max(16, next_power_of_2(queries * group)))
    block_n = min(page_size, 64 if d * cache.element_size() <= 512 else 32)
    row_blocks = -(-queries * group // block_g)
    if window:
        longest = min(longest, window + queries)
    if window or skip is not None:
        longest += block_n  # the first block may begin before the first key
    splits, split_tokens = _splits(longest, page_size, seqs * kv_heads * row_blocks, q.device, batch_invariant)
    parts = q.new_empty(tokens, heads, splits, d, dtype=torch.float32)
    part_lse = q.new_empty(tokens, heads, splits, dtype=torch.float32)
    _decode_split[(seqs, kv_heads * row_blocks, splits)](
        q, cache, page_table, context_lens, context_lens if skip is None else skip, parts, part_lse,
        q.stride(0), q.stride(1), page_table.stride(0),
        layers * 2 * kv_heads * page_size * d, layer * 2 * kv_heads * page_size * d, splits, split_tokens, queries,
        (soft_cap or d**-0.5) * _LOG2_E, 2 * _LOG2_E * d**-0.5 / soft_cap if soft_cap else 1.0,
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=d, PAGE_SIZE=page_size,
        BLOCK_G=block_g, BLOCK_D=next_power_of_2(d), BLOCK_N=block_n, ROW_BLOCKS=row_blocks,
        CAUSAL=causal, WINDOW=window, SKIPS=skip is not None, PARTS=_PARTS if batch_invariant else 0,
        CAPPED=soft_cap > 0, DOT=dot_precision(), num_warps=4, num_stages=2,
    )  # fmt: skip
    _decode_merge[(tokens, heads)](
        parts, part_lse, out, out if lse is None else lse, splits,
        HEAD_DIM=d, BLOCK_D=next_power_of_2(d), WITH_LSE=lse is not None, num_warps=1,
    )  # fmt: skip


def _splits(
    longest: int, page_size: int, programs: int, device: torch.device, batch_invariant: bool
) -> tuple[int, int]:
    """(parts of the longest context, tokens of a part)."""
    if batch_invariant:
        return max(1, min(_PARTS, -(-longest // _PART_TOKENS))), _PART_TOKENS
    widest = max(1, -(-longest // page_size))  # pages
    split_pages = -(-widest // split_count(programs, widest, device))
    return -(-widest // split_pages), split_pages * page_size


def split_count(programs: int, pages: int, device: torch.device) -> int:
    """Parts of the longest context: enough to give every multiprocessor two programs, one page each at least."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(pages, 2 * cores // programs))


@TritonKernel
@no_type_check
def _decode_split(
    q_ptr,
    cache_ptr,
    page_table_ptr,
    context_lens_ptr,
    skip_ptr,
    parts_ptr,
    part_lse_ptr,
    q_token_stride,
    q_head_stride,
    page_table_stride,
    page_stride,
    layer_offset,
    splits,
    split_tokens,
    queries,
    scale,
    squeeze,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SKIPS: tl.constexpr,
    PARTS: tl.constexpr,
    CAPPED: tl.constexpr,
    DOT: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // ROW_BLOCKS
    split = tl.program_id(2)
    context = tl.load(context_lens_ptr + seq)
    oldest = 0  # key
    if WINDOW > 0:
        oldest = tl.maximum(context - (queries + WINDOW - 1), 0)
    if SKIPS:
        oldest = tl.load(skip_ptr)
    base = oldest // BLOCK_N * BLOCK_N
    if PARTS > 0:
        split_tokens = tl.maximum(split_tokens, tl.cdiv(context - base, PARTS * BLOCK_N) * BLOCK_N)
    begin = base + split * split_tokens
    end = tl.minimum(begin + split_tokens, context)
    row = tl.program_id(1) % ROW_BLOCKS * BLOCK_G + tl.arange(0, BLOCK_G)
    query = row // GROUP
    token = seq * queries + query
    head = kv_head * GROUP + row % GROUP
    part = (token * (KV_HEADS * GROUP) + head) * splits + split
    if begin >= end:
        tl.store(part_lse_ptr + part, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=query < queries)
        return
    NOTHING: tl.constexpr = -1.0e30
    i = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    q_mask = (query < queries)[:, None] & (i < HEAD_DIM)[None, :]
    q_rows = q_ptr + token * q_token_stride + head * q_head_stride
    q = tl.load(q_rows[:, None] + i[None, :], mask=q_mask, other=0.0)
    q = q.to(cache_ptr.dtype.element_ty)
    k_base = cache_ptr + layer_offset + kv_head * PAGE_SIZE * HEAD_DIM
    newest = tl.minimum(context - queries + query, context - 1)  # key of each row
    top = tl.full([BLOCK_G], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        page = tl.load(page_table_ptr + seq * page_table_stride + start // PAGE_SIZE).to(tl.int64)
        # Rows past the context are never loaded: they may hold NaN of an earlier owner.
        key = start + n
        inside = key < end
        k_ptr = k_base + page * page_stride + (start % PAGE_SIZE) * HEAD_DIM
        tile = n[:, None] * HEAD_DIM + i[None, :]
        kv_mask = inside[:, None] & (i < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + tile, mask=kv_mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=DOT)
        if CAPPED:
            s = 1.0 - 2.0 / (tl.exp2(s * squeeze) + 1.0)  # tanh
        s *= scale
        if SKIPS:
            inside = inside & (key >= oldest)
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= newest[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > newest[:, None] - WINDOW)
        s = tl.where(seen, s, NOTHING)
        new_top = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        v = tl.load(k_ptr + KV_HEADS * PAGE_SIZE * HEAD_DIM + tile, mask=kv_mask, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=DOT)
        total = total * shrink + tl.sum(p, axis=1)
        top = new_top
    tl.store(parts_ptr + part[:, None] * HEAD_DIM + i[None, :], acc / total[:, None], mask=q_mask)
    lse = tl.where(top > NOTHING, top + tl.log2(total), float("-inf"))
    tl.store(part_lse_ptr + part, lse, mask=query < queries)


@TritonKernel
@no_type_check
def _decode_merge(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    AT_ONCE: tl.constexpr = 8  # parts
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    i = tl.arange(0, BLOCK_D)
    j = tl.arange(0, AT_ONCE)
    top = tl.full([1], -1.0e30, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, AT_ONCE):
        part = row * splits + first + j
        lse = tl.load(part_lse_ptr + part, mask=first + j < splits, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        shrink, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        # A part that no key of the context lies in was not written.
        written = (weight > 0)[:, None] & (i < HEAD_DIM)[None, :]
        value = tl.load(parts_ptr + part[:, None] * HEAD_DIM + i[None, :], mask=written, other=0.0)
        acc = acc * shrink + tl.sum(weight[:, None] * value, axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        top = new_top
    some = total > 0
    tl.store(out_ptr + row * HEAD_DIM + i, acc / tl.where(some, total, 1.0), mask=i < HEAD_DIM)
    if WITH_LSE:
        lse = (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
        tl.store(lse_ptr + row + tl.arange(0, 1), tl.where(some, lse, float("-inf")))

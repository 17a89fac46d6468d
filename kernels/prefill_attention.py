"""Causal attention of prefill chunks over paged KV: the prefix and the chunk's own keys are read from pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import numpy as np
import torch
from torch import Tensor

from kernels.attention_options import check_options
from kernels.attention_plan import AttentionPlan, check_lse
from kernels.capability import dot_precision, has_hopper_prefill
from kernels.triton_kernel import TritonKernel, next_power_of_2
from kernels.upload import upload

if TYPE_CHECKING:
    import triton.language as tl

# Queries a call of the CPU's flash attention: 512 queries on themselves took 6.1 ms in blocks of 64, 10.0 at once.
_CPU_BLOCK = 64


def prefill_attention(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    lse: Tensor | None = None,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Queries of the sequences after the plan's decodes, q [tokens, heads, d] -> [tokens, heads, d] in q's dtype.

    cache [pages, layers, 2, kv_heads, page_size, d]. `lse` [tokens, heads] float32, where it is given, receives the
    log of each softmax's sum of exponentials. `window` and `soft_cap`: see `check_options`; keys older than a tile's
    window cost nothing.
    """
    check_options(window, soft_cap)
    tokens = plan.num_tokens - plan.decode_tokens
    plan.check(q, cache, layer, tokens)
    check_lse(lse, q)
    if window >= max(plan.contexts):
        window = 0
    if has_hopper_prefill(q, cache):
        from kernels.hopper_prefill import prefill_attention_hopper

        return prefill_attention_hopper(q, cache, layer, plan, lse, window=window, soft_cap=soft_cap)
    backend = prefill_attention_triton if q.is_cuda else prefill_attention_torch
    return backend(q, cache, layer, plan, lse, window=window, soft_cap=soft_cap)


def prefill_attention_torch(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    lse: Tensor | None = None,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """The twin of `prefill_attention_triton`, and the CPU backend: torch's flash attention over gathered pages.

    It loops over sequences and blocks of 64 queries: a block stops at its own last key, so nothing above the
    diagonal is computed but inside a block, and one small mask serves all blocks.
    """
    _, layers, _, kv_heads, page_size, d = cache.shape
    chunks = plan.once(("tiles", cache.shape, window), lambda: _tile_numbers(plan, layers, kv_heads, window))
    mask = plan.once(("mask", window), lambda: _block_mask(max(plan.contexts), window))
    tiles = cache.view(-1, page_size * d)
    out = torch.empty(q.shape)
    queries = q.float().transpose(0, 1).unsqueeze(0)  # [1, heads, tokens, d]
    start = 0
    for (old, numbers), chunk, context in zip(
        chunks, plan.queries[plan.num_decodes :], plan.contexts[plan.num_decodes :], strict=True
    ):
        gathered = tiles.index_select(0, numbers + layer * 2 * kv_heads).float()
        k, v = gathered.view(2, 1, kv_heads, -1, d).unbind(0)  # [1, kv_heads, keys, d], the first is key `old`
        for first in range(0, chunk, _CPU_BLOCK):
            rows = min(_CPU_BLOCK, chunk - first)
            end = context - chunk + first + rows - old
            keys = slice(max(end - rows - window + 1, 0) if window else 0, end)
            part = slice(start + first, start + first + rows)
            visible = mask[_CPU_BLOCK - rows :, mask.shape[1] - (end - keys.start) :]
            block, block_lse = _attend(queries[:, :, part], k[:, :, keys], v[:, :, keys], visible, soft_cap)
            out[part] = block[0].transpose(0, 1)
            if lse is not None:
                lse[part] = block_lse[0].transpose(0, 1)
        start += chunk
    return out.to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, soft_cap: float) -> tuple[Tensor, Tensor]:
    """(out [1, heads, rows, d], lse [1, heads, rows]) of q [1, heads, rows, d] and k, v [1, kv_heads, keys, d]."""
    if not soft_cap:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)[:2]
        return out, lse
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3)).mul_(q.shape[3] ** -0.5 / soft_cap).tanh_().mul_(soft_cap).add_(mask)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _tile_numbers(plan: AttentionPlan, layers: int, kv_heads: int, window: int) -> list[tuple[int, Tensor]]:
    """For each chunk: the oldest key to gather, a page's first; and the tiles [2, kv_heads, pages] from there on, of
    layer 0, in the pool seen as [tiles, page_size * d]."""
    tile = torch.arange(2 * kv_heads).unsqueeze(1)
    numbers = []
    for seq in range(plan.num_decodes, len(plan.queries)):
        seen = plan.contexts[seq] - plan.queries[seq] + 1 - window if window else 0  # oldest key of the first query
        page = max(seen, 0) // plan.page_size
        pages = plan.pages()[seq][page:]
        numbers.append((page * plan.page_size, (pages * (layers * 2 * kv_heads) + tile).view(-1)))
    return numbers


def _block_mask(widest: int, window: int) -> Tensor:
    """[64, keys]: the last rows and columns of it mask a block of queries that ends at its last key."""
    columns = min(widest, window or widest) + _CPU_BLOCK
    last = torch.arange(columns - _CPU_BLOCK, columns).unsqueeze(1)
    key = torch.arange(columns)
    hidden = (key > last) | (key <= last - (window or columns))
    return torch.zeros(_CPU_BLOCK, columns).masked_fill_(hidden, float("-inf"))


def prefill_attention_triton(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    lse: Tensor | None = None,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """One program for a tile of a chunk's queries and a head; keys in blocks that lie within a page."""
    _, layers, _, kv_heads, page_size, d = cache.shape
    tokens, heads, _ = q.shape
    if q.stride(2) != 1:
        raise ValueError("q must be contiguous in its last dimension")
    # None of these spills but float32 with heads wider than 64, which serves checks.
    row_bytes = d * cache.element_size()
    block_m, block_n = (128, 64) if row_bytes <= 256 else (64, 32) if row_bytes <= 512 else (32, 32)
    tiles = plan.once(("prefill tiles", block_m), lambda: _tiles(plan, block_m))
    out = q.new_empty(tokens, heads, d)
    _prefill[(tiles.shape[1], heads)](
        q,
        cache,
        plan.page_table,
        plan.query_starts,
        plan.context_lens,
        tiles,
        out,
        out if lse is None else lse,
        q.stride(0),
        q.stride(1),
        plan.page_table.stride(0),
        layers * 2 * kv_heads * page_size * d,
        layer * 2 * kv_heads * page_size * d,
        plan.decode_tokens,
        d**-0.5 * _LOG2_E,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=d,
        PAGE_SIZE=page_size,
        BLOCK_M=block_m,
        BLOCK_N=min(page_size, block_n),
        BLOCK_D=next_power_of_2(d),
        WITH_LSE=lse is not None,
        WINDOW=window,
        SOFT_CAP=float(soft_cap) * _LOG2_E,
        DOT=dot_precision(),
        num_warps=8,
        num_stages=2,
    )
    return out


def _tiles(plan: AttentionPlan, block_m: int) -> Tensor:
    """[2, tiles] int32: a tile's sequence, and its first query within the chunk."""
    pairs = [
        (seq, first)
        for seq in range(plan.num_decodes, len(plan.queries))
        for first in range(0, plan.queries[seq], block_m)
    ]
    return upload([np.array(pairs, dtype=np.int32).T], plan.page_table.device)[0]


_LOG2_E = 1.4426950408889634  # the kernel exponentiates to base 2


@TritonKernel
@no_type_check
def _prefill(
    q_ptr,
    cache_ptr,
    page_table_ptr,
    query_starts_ptr,
    context_lens_ptr,
    tiles_ptr,
    out_ptr,
    lse_ptr,
    q_token_stride,
    q_head_stride,
    page_table_stride,
    page_stride,
    layer_offset,
    decodes,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_LSE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,  # to base 2, as scale
    DOT: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.load(tiles_ptr + tile).to(tl.int64)
    first = tl.load(tiles_ptr + tl.num_programs(0) + tile)
    chunk_start = tl.load(query_starts_ptr + seq)
    chunk = tl.load(query_starts_ptr + seq + 1) - chunk_start
    prefix = tl.load(context_lens_ptr + seq) - chunk
    m = first + tl.arange(0, BLOCK_M)
    i = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    token = (chunk_start - decodes + m).to(tl.int64)
    q_mask = (m < chunk)[:, None] & (i < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + token[:, None] * q_token_stride + head * q_head_stride + i[None, :], mask=q_mask, other=0.0)
    q = q.to(cache_ptr.dtype.element_ty)
    k_base = cache_ptr + layer_offset + head // (HEADS // KV_HEADS) * PAGE_SIZE * HEAD_DIM
    # Keys that all rows see need no mask; the last blocks hold the diagonal and the end of the context, the first ones
    # keys that are too old for some rows.
    whole = (prefix + first + 1) // BLOCK_N * BLOCK_N
    end = prefix + tl.minimum(first + BLOCK_M, chunk)
    oldest = 0
    clear = 0
    if WINDOW:
        oldest = tl.maximum(prefix + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        clear = tl.minimum((tl.maximum(prefix + first + BLOCK_M - WINDOW, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, whole)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for phase in tl.static_range(0 if WINDOW else 1, 3):
        begin = oldest if phase == 0 else clear if phase == 1 else whole
        stop = clear if phase == 0 else whole if phase == 1 else end
        for start in range(begin, stop, BLOCK_N):
            page = tl.load(page_table_ptr + seq * page_table_stride + start // PAGE_SIZE).to(tl.int64)
            k_ptr = k_base + page * page_stride + (start % PAGE_SIZE) * HEAD_DIM
            offsets = n[:, None] * HEAD_DIM + i[None, :]
            kv_mask = (i < HEAD_DIM)[None, :]
            if phase == 2:
                # Rows past the context are never loaded: they may hold NaN of an earlier owner.
                kv_mask = kv_mask & (start + n < end)[:, None]
            k = tl.load(k_ptr + offsets, mask=kv_mask, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=DOT) * scale
            if SOFT_CAP > 0:
                # tanh x = 1 - 2 / (1 + exp 2x), to the type's precision
                s = SOFT_CAP - 2 * SOFT_CAP / (1 + tl.exp2(s * (2 * 1.4426950408889634 / SOFT_CAP)))
            if phase != 1:
                seen = (start + n)[None, :] <= (prefix + m)[:, None]
                if WINDOW:
                    seen = seen & ((start + n)[None, :] > (prefix + m - WINDOW)[:, None])
                # Finite: a row with nothing but masked keys so far keeps sums that the next maximum wipes out.
                s = tl.where(seen, s, -1e30)
            new_top = tl.maximum(top, tl.max(s, axis=1))
            p = tl.exp2(s - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            v = tl.load(k_ptr + KV_HEADS * PAGE_SIZE * HEAD_DIM + offsets, mask=kv_mask, other=0.0)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=DOT)
            total = total * shrink + tl.sum(p, axis=1)
            top = new_top
    row = token * HEADS + head
    tl.store(out_ptr + row[:, None] * HEAD_DIM + i[None, :], acc / total[:, None], mask=q_mask)
    if WITH_LSE:
        tl.store(lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453, mask=m < chunk)

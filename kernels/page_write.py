"""Write new keys and values into their pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.triton_kernel import TritonKernel, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


def page_write(k: Tensor, v: Tensor, cache: Tensor, layer: int, slots: Tensor) -> None:
    """Put k, v [tokens, kv_heads, d] at `slots` [tokens] int64 (page * page_size + offset) of one layer.

    cache [pages, layers, 2, kv_heads, page_size, d] is changed in place; k and v are converted to its dtype. Slots
    must differ; at a slot of -1 (a row that pads a graph) nothing is written. They are not compared with the pool here:
    on CPU torch refuses one past its end, on CUDA none does.
    """
    tokens = slots.shape[0]
    check_cache(cache, layer)
    if k.shape != (tokens, cache.shape[3], cache.shape[5]) or v.shape != k.shape:
        raise ValueError(f"k and v must be {(tokens, cache.shape[3], cache.shape[5])}, not {tuple(k.shape)}")
    if cache.is_cuda:
        page_write_triton(k, v, cache, layer, slots)
    else:
        page_write_torch(k, v, cache, layer, slots)


def check_cache(cache: Tensor, layer: int) -> None:
    """Raises ValueError where `cache` has not the layout of pages, or no such layer."""
    if cache.ndim != 6 or not cache.is_contiguous():
        raise ValueError("cache must be [pages, layers, 2, kv_heads, page_size, d], contiguous")
    if not 0 <= layer < cache.shape[1]:
        raise ValueError(f"layer {layer} of a cache of {cache.shape[1]}")


def page_write_torch(k: Tensor, v: Tensor, cache: Tensor, layer: int, slots: Tensor) -> None:
    """The twin of `page_write_triton`."""
    page_size = cache.shape[4]
    if slots.shape[0] == 1:  # 14 us where the general way takes 72, between two reads of weights
        slot = int(slots.item())
        if slot < 0:
            return
        page, offset = divmod(slot, page_size)
        k_row, v_row = cache.select(0, page).select(0, layer).select(2, offset).unbind()  # [kv_heads, d]
        k_row.copy_(k.squeeze(0))
        v_row.copy_(v.squeeze(0))
        return
    if bool((slots < 0).any()):
        kept = slots >= 0
        k, v, slots = k[kept], v[kept], slots[kept]
    where = (slots // page_size, slots % page_size)
    # [pages, page_size, 2, kv_heads, d] = [tokens, 2, kv_heads, d]
    cache.select(1, layer).permute(0, 3, 1, 2, 4).index_put_(where, torch.stack((k, v), 1).to(cache.dtype))


def page_write_triton(k: Tensor, v: Tensor, cache: Tensor, layer: int, slots: Tensor) -> None:
    """One program a token; k and v may be views (last dimension contiguous)."""
    if k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError("k and v must be contiguous in their last dimension")
    _, layers, _, kv_heads, page_size, d = cache.shape
    _page_write[(slots.shape[0],)](
        k,
        v,
        cache,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        layers * 2 * kv_heads * page_size * d,
        layer * 2 * kv_heads * page_size * d,
        KV_HEADS=kv_heads,
        PAGE_SIZE=page_size,
        HEAD_DIM=d,
        BLOCK_HEADS=next_power_of_2(kv_heads),
        BLOCK_D=next_power_of_2(d),
        num_warps=4,
    )


@TritonKernel
@no_type_check
def _page_write(
    k_ptr,
    v_ptr,
    cache_ptr,
    slots_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    layer_offset,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    i = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < KV_HEADS) & (i < HEAD_DIM) & (slot >= 0)
    k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + i, mask=inside)
    v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + i, mask=inside)
    page = cache_ptr + slot // PAGE_SIZE * page_stride + layer_offset
    row = page + (head * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM + i
    tl.store(row, k, mask=inside)
    tl.store(row + KV_HEADS * PAGE_SIZE * HEAD_DIM, v, mask=inside)

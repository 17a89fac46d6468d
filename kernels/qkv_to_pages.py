"""From a layer's fused projection to what attention reads: QK-norm, rotary embedding and page write in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.capability import is_hopper
from kernels.page_write import check_cache, page_write_torch
from kernels.rms_norm import rms_norm_torch
from kernels.rope import rope_torch
from kernels.triton_kernel import TritonKernel, launch_options, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

_HEADS = 8  # of a program


def qkv_to_pages(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cache: Tensor,
    layer: int,
    slots: Tensor,
    *,
    overlap_previous: bool = False,
) -> Tensor:
    """Return the rotated q [tokens, heads, d]; put the rotated k, and v, at `slots` of one layer's pages.

    qkv [tokens, heads + 2 * kv_heads, d], heads of q first, then k's, then v's. cos, sin [tokens, d] float32: the
    tokens' rows of `rope_tables`. q_norm, k_norm [d]: weights of `rms_norm` over each head before it is rotated
    (Qwen3), both or neither. cache [pages, layers, 2, kv_heads, page_size, d] is changed in place. slots [tokens]
    int64: page * page_size + offset, all different; at -1 (a row that pads a graph) nothing is written.

    `overlap_previous`: on Hopper, start up while the previous kernel of the stream still runs.
    """
    check_cache(cache, layer)
    _check(qkv, cos, sin, q_norm, k_norm, cache, slots)
    if qkv.is_cuda:
        return qkv_to_pages_triton(
            qkv, cos, sin, q_norm, k_norm, eps, cache, layer, slots, overlap_previous=overlap_previous
        )
    return qkv_to_pages_torch(qkv, cos, sin, q_norm, k_norm, eps, cache, layer, slots)


def qkv_to_pages_torch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cache: Tensor,
    layer: int,
    slots: Tensor,
) -> Tensor:
    """The twin of `qkv_to_pages_triton`: its three steps one after the other."""
    kv_heads = cache.shape[3]
    q, k, v = qkv[:, : -2 * kv_heads], qkv[:, -2 * kv_heads : -kv_heads], qkv[:, -kv_heads:]
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_torch(q, q_norm, eps), rms_norm_torch(k, k_norm, eps)
    q, k = rope_torch(q, k, cos, sin)
    page_write_torch(k, v, cache, layer, slots)
    return q


def qkv_to_pages_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cache: Tensor,
    layer: int,
    slots: Tensor,
    *,
    overlap_previous: bool = False,
) -> Tensor:
    """One program for 8 heads of a token; float32 inside, rounded where the separate steps round."""
    _check_layout(qkv, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm, cache=cache, slots=slots)
    tokens, all_heads, d = qkv.shape
    _, layers, _, kv_heads, page_size, _ = cache.shape
    out = torch.empty(tokens, all_heads - 2 * kv_heads, d, dtype=qkv.dtype, device=qkv.device)
    _qkv_to_pages[(tokens, -(-all_heads // _HEADS))](
        qkv,
        cos,
        sin,
        q_norm,
        k_norm,
        cache,
        slots,
        out,
        eps,
        qkv.stride(0),
        layers * 2 * kv_heads * page_size * d,
        layer * 2 * kv_heads * page_size * d,
        HEADS=all_heads - 2 * kv_heads,
        KV_HEADS=kv_heads,
        PAGE_SIZE=page_size,
        HALF=d // 2,
        BLOCK_HEADS=_HEADS,
        BLOCK_HALF=next_power_of_2(d // 2),
        NORM=q_norm is not None,
        num_warps=4,
        **launch_options(overlap_previous and is_hopper(qkv.device)),
    )
    return out


@TritonKernel
@no_type_check
def _qkv_to_pages(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cache_ptr,
    slots_ptr,
    out_ptr,
    eps,
    token_stride,
    page_stride,
    layer_offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < HEADS + 2 * KV_HEADS) & (i < HALF)
    is_q = head < HEADS
    is_v = head >= HEADS + KV_HEADS
    row = qkv_ptr + token * token_stride + head * (2 * HALF) + i
    a = tl.load(row, mask=inside, other=0.0)
    b = tl.load(row + HALF, mask=inside, other=0.0)
    angle = token * 2 * HALF + HALF + i  # the second half of a row, where sin has its own sign
    cos = tl.load(cos_ptr + angle, mask=i < HALF, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=i < HALF, other=0.0)
    x = a.to(tl.float32)
    y = b.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / (2 * HALF) + eps)[:, None]
        q_norm = tl.load(q_norm_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)
        k_norm = tl.load(k_norm_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)
        x = (x * scale * tl.where(is_q, q_norm, k_norm)).to(a.dtype).to(tl.float32)
        q_norm = tl.load(q_norm_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
        k_norm = tl.load(k_norm_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
        y = (y * scale * tl.where(is_q, q_norm, k_norm)).to(a.dtype).to(tl.float32)
    first = tl.where(is_v, a, (x * cos - y * sin).to(a.dtype))
    second = tl.where(is_v, b, (y * cos + x * sin).to(a.dtype))
    out = out_ptr + (token * HEADS + head) * (2 * HALF) + i
    tl.store(out, first, mask=inside & is_q)
    tl.store(out + HALF, second, mask=inside & is_q)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    written = inside & (head >= HEADS) & (slot >= 0)
    # K's heads, then V's, are neighbours in a page as they are in qkv.
    place = ((head - HEADS) * PAGE_SIZE + slot % PAGE_SIZE) * (2 * HALF) + i
    page = cache_ptr + slot // PAGE_SIZE * page_stride + layer_offset + place
    tl.store(page, first.to(cache_ptr.dtype.element_ty), mask=written)
    tl.store(page + HALF, second.to(cache_ptr.dtype.element_ty), mask=written)


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cache: Tensor, slots: Tensor
) -> None:
    """Shapes: all that the twin needs, which takes any layout."""
    tokens, heads, d = qkv.shape
    kv_heads = cache.shape[3]
    if d != cache.shape[5] or d % 2 or heads <= 2 * kv_heads:
        raise ValueError(f"qkv must be [tokens, heads + {2 * kv_heads}, {cache.shape[5]}], not {tuple(qkv.shape)}")
    if cos.shape != (tokens, d) or sin.shape != (tokens, d):
        raise ValueError(f"cos and sin must be {(tokens, d)}, not {tuple(cos.shape)} and {tuple(sin.shape)}")
    if slots.shape != (tokens,):
        raise ValueError(f"slots must be {(tokens,)}, not {tuple(slots.shape)}")
    if q_norm is None and k_norm is None:
        return
    if q_norm is None or k_norm is None or q_norm.shape != (d,) or k_norm.shape != (d,):
        raise ValueError(f"q_norm and k_norm must both be {(d,)}, or None")


def _check_layout(qkv: Tensor, **others: Tensor | None) -> None:
    """What the kernel asks besides."""
    if qkv.stride(2) != 1 or qkv.stride(1) != qkv.shape[2]:
        raise ValueError("qkv must have contiguous tokens")
    for name, tensor in others.items():
        if tensor is not None and (tensor.device != qkv.device or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous on {qkv.device}, where qkv is")
    for name in ("cos", "sin"):
        tensor = others[name]
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, not {tensor.dtype}")

"""What the Hopper kernels ask of a page pool, and how they see it."""

from functools import cache as run_once

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

# Shared memory as TMA fills it and wgmma reads it: columns of 64 16-bit elements.
SWIZZLE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def check_pool(q: Tensor, cache: Tensor, layer: int) -> None:
    """Raises ValueError naming what is wrong with q [tokens, heads, d] or with the pool's type, layout or size."""
    if cache.ndim != 6 or cache.shape[2] != 2 or not cache.is_contiguous():
        raise ValueError("cache must be [pages, layers, 2, kv_heads, page_size, d], contiguous")
    if q.ndim != 3 or q.shape[2] != cache.shape[5] or q.shape[1] % cache.shape[3]:
        raise ValueError(f"q must be [tokens, a multiple of {cache.shape[3]}, {cache.shape[5]}], not {list(q.shape)}")
    if q.dtype != cache.dtype or q.device != cache.device:
        raise ValueError(f"q is {q.dtype} on {q.device}, cache {cache.dtype} on {cache.device}")
    if q.stride(2) != 1 or q.stride(1) != q.shape[2] or q.stride(0) % 8 or q.data_ptr() % 16:
        raise ValueError("q must have contiguous tokens, 16-byte aligned")
    if not 0 <= layer < cache.shape[1]:
        raise ValueError(f"layer {layer} of a cache of {cache.shape[1]} layers")
    if cache.numel() // cache.shape[5] >= 2**31:
        raise ValueError(f"cache has {cache.numel() // cache.shape[5]} rows; TMA counts them in 31 bits")


@run_once
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; an H100's where there is none (compiling for it elsewhere)."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count

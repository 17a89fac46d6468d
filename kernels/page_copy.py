"""Copy whole pages between a pool and one contiguous block."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.triton_kernel import TritonKernel

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 8192  # elements a program copies


def page_gather(cache: Tensor, pages: Tensor) -> Tensor:
    """cache [pages, ...], pages [n] int64 -> [n, elements of a page], contiguous. Pages must lie in the pool."""
    flat = _flat(cache)
    _check_pages(cache, pages)
    return page_gather_triton(flat, pages) if cache.is_cuda else torch.index_select(flat, 0, pages)


def page_scatter(cache: Tensor, pages: Tensor, data: Tensor) -> None:
    """Put data [n, elements of a page] into `pages` [n] int64 of cache [pages, ...], in place. Pages must differ."""
    flat = _flat(cache)
    _check_pages(cache, pages)
    if data.shape != (pages.shape[0], flat.shape[1]) or data.dtype != cache.dtype:
        raise ValueError(f"data is {data.dtype} {tuple(data.shape)}, not {cache.dtype} {(len(pages), flat.shape[1])}")
    if cache.is_cuda:
        page_scatter_triton(flat, pages, data)
    else:
        flat.index_copy_(0, pages, data)


def page_gather_triton(flat: Tensor, pages: Tensor) -> Tensor:
    """flat [pages, elements] -> [n, elements]."""
    out = flat.new_empty(pages.shape[0], flat.shape[1])
    _launch(flat, pages, out, scatter=False)
    return out


def page_scatter_triton(flat: Tensor, pages: Tensor, data: Tensor) -> None:
    """data [n, elements] -> rows of flat [pages, elements]."""
    _launch(flat, pages, data.contiguous(), scatter=True)


def _launch(flat: Tensor, pages: Tensor, data: Tensor, *, scatter: bool) -> None:
    elements = flat.shape[1]
    if not len(pages):
        return
    grid = (pages.shape[0], -(-elements // _BLOCK))
    _page_copy[grid](flat, pages, data, elements, SCATTER=scatter, BLOCK=_BLOCK, num_warps=8)


@TritonKernel
@no_type_check
def _page_copy(flat_ptr, pages_ptr, data_ptr, elements, SCATTER: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    paged = flat_ptr + tl.load(pages_ptr + n) * elements + i
    packed = data_ptr + n * elements + i
    if SCATTER:
        tl.store(paged, tl.load(packed, mask=inside), mask=inside)
    else:
        tl.store(packed, tl.load(paged, mask=inside), mask=inside)


def _flat(cache: Tensor) -> Tensor:
    if not cache.is_contiguous():
        raise ValueError("cache must be contiguous")
    return cache.view(cache.shape[0], -1)


def _check_pages(cache: Tensor, pages: Tensor) -> None:
    if pages.ndim != 1 or pages.dtype != torch.int64 or not pages.is_contiguous():
        raise ValueError(f"pages must be contiguous int64 [n], not {pages.dtype} {tuple(pages.shape)}")
    if pages.device != cache.device:
        raise ValueError(f"pages is on {pages.device}, cache on {cache.device}")

"""A 64-bit checksum of each of some pages, made where the pool is."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.triton_kernel import TritonKernel

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 4096  # words that a program adds up at a time
_WORDS = 1 << 16  # words of one program


def page_checksum(cache: Tensor, pages: Tensor) -> Tensor:
    """cache [pages, ...], pages [n] int64 -> int64 [n]. Pages must lie in the pool; a page is a multiple of 4 bytes.

    The sum of (2 i + 1) w_i modulo 2^64 over the page's 32-bit words w_i. The weights are odd, so any one word that
    changes changes the sum; they differ by less than 2^32, so two words that change places do too.
    """
    if not cache.is_contiguous():
        raise ValueError("cache must be contiguous")
    words = cache.view(cache.shape[0], -1).view(torch.int32)  # [pages, words]
    return page_checksum_triton(words, pages) if cache.is_cuda else page_checksum_torch(words, pages)


def page_checksum_torch(words: Tensor, pages: Tensor) -> Tensor:
    """words int32 [pages, words] -> int64 [n]. Products and sums wrap around."""
    weights = 2 * torch.arange(words.shape[1], device=words.device) + 1  # int64 [words]
    return ((words[pages].long() & 0xFFFFFFFF) * weights).sum(1)


def page_checksum_triton(words: Tensor, pages: Tensor) -> Tensor:
    """words int32 [pages, words] -> int64 [n]."""
    count = words.shape[1]
    parts = torch.zeros(len(pages), -(-count // _WORDS), dtype=torch.int64, device=words.device)
    if len(pages):
        _page_checksum[parts.shape](words, pages, parts, count, WORDS=_WORDS, BLOCK=_BLOCK, num_warps=8)
    return parts.sum(1)


@TritonKernel
@no_type_check
def _page_checksum(words_ptr, pages_ptr, parts_ptr, count, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    n, part = tl.program_id(0), tl.program_id(1)
    page_ptr = words_ptr + tl.load(pages_ptr + n) * count
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(part * WORDS, min(count, (part + 1) * WORDS), BLOCK):
        i = start + tl.arange(0, BLOCK)
        word = tl.load(page_ptr + i, mask=i < count, other=0).to(tl.int64) & 0xFFFFFFFF
        sums += word * (2 * i.to(tl.int64) + 1)
    tl.store(parts_ptr + n * tl.num_programs(1) + part, tl.sum(sums, axis=0))

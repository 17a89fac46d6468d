"""The two ends of a decode step on a resident batch: where each row's token stands, and on to the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.triton_kernel import TritonKernel

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 128  # rows of a program: one compiled kernel for batches of all sizes


def row_places(context_lens: Tensor, page_table: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """(positions, slots), each [rows] int64: of each row's newest token, in its sequence and in the pool.

    context_lens [rows] int32 counts the newest token; 0 marks a row without a sequence, whose position is 0 and whose
    slot is -1. page_table [rows, columns] int32.
    """
    _check(context_lens)
    if page_table.ndim != 2 or page_table.dtype != torch.int32 or page_table.stride(1) != 1:
        raise ValueError("page_table must be int32 of 2 dimensions, its rows contiguous")
    if page_table.shape[0] != context_lens.shape[0]:
        raise ValueError(f"page_table has {page_table.shape[0]} rows, context_lens {context_lens.shape[0]}")
    places = row_places_triton if context_lens.is_cuda else row_places_torch
    return places(context_lens, page_table, page_size)


def row_places_torch(context_lens: Tensor, page_table: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """The twin of `row_places_triton`."""
    positions = (context_lens.long() - 1).clamp(min=0)
    pages = page_table.gather(1, positions.unsqueeze(1) // page_size).squeeze(1).long()
    slots = pages * page_size + positions % page_size
    return positions, slots.masked_fill(context_lens == 0, -1)


def row_places_triton(context_lens: Tensor, page_table: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """One launch of programs for 128 rows each."""
    rows = context_lens.shape[0]
    positions, slots = torch.empty(2, rows, dtype=torch.int64, device=context_lens.device)
    _row_places[(-(-rows // _BLOCK),)](
        context_lens,
        page_table,
        positions,
        slots,
        rows,
        page_table.stride(0),
        PAGE_SIZE=page_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return positions, slots


def advance_rows(token_ids: Tensor, context_lens: Tensor, ids: Tensor) -> None:
    """Make `ids` [rows] int64 the rows' newest tokens.

    token_ids [rows] int64 and context_lens [rows] int32 are changed in place. A row without a sequence (context 0)
    stays as it is.
    """
    _check(context_lens)
    for name, tensor in (("token_ids", token_ids), ("ids", ids)):
        if tensor.shape != context_lens.shape or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64 {list(context_lens.shape)}")
    advance = advance_rows_triton if context_lens.is_cuda else advance_rows_torch
    advance(token_ids, context_lens, ids)


def advance_rows_torch(token_ids: Tensor, context_lens: Tensor, ids: Tensor) -> None:
    """The twin of `advance_rows_triton`."""
    seated = context_lens > 0
    token_ids.copy_(torch.where(seated, ids, token_ids))
    context_lens.add_(seated)


def advance_rows_triton(token_ids: Tensor, context_lens: Tensor, ids: Tensor) -> None:
    """One launch of programs for 128 rows each."""
    rows = context_lens.shape[0]
    _advance_rows[(-(-rows // _BLOCK),)](token_ids, context_lens, ids, rows, BLOCK=_BLOCK, num_warps=4)


def _check(context_lens: Tensor) -> None:
    if context_lens.ndim != 1 or context_lens.dtype != torch.int32 or not context_lens.is_contiguous():
        raise ValueError("context_lens must be contiguous int32 of 1 dimension")


@TritonKernel
@no_type_check
def _row_places(
    context_lens_ptr,
    page_table_ptr,
    positions_ptr,
    slots_ptr,
    rows,
    table_stride,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    context = tl.load(context_lens_ptr + row, mask=inside, other=0)
    seated = context > 0
    position = tl.maximum(context - 1, 0)
    page = tl.load(page_table_ptr + row.to(tl.int64) * table_stride + position // PAGE_SIZE, mask=seated, other=0)
    slot = page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
    tl.store(positions_ptr + row, position.to(tl.int64), mask=inside)
    tl.store(slots_ptr + row, tl.where(seated, slot, -1), mask=inside)


@TritonKernel
@no_type_check
def _advance_rows(token_ids_ptr, context_lens_ptr, ids_ptr, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    context = tl.load(context_lens_ptr + row, mask=row < rows, other=0)
    seated = context > 0
    token = tl.load(ids_ptr + row, mask=seated, other=0)
    tl.store(token_ids_ptr + row, token, mask=seated)
    tl.store(context_lens_ptr + row, context + 1, mask=seated)

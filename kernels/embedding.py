"""The rows of an embedding table that tokens ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.capability import is_hopper
from kernels.triton_kernel import TritonKernel, launch_options

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024


def embedding(token_ids: Tensor, table: Tensor, dtype: torch.dtype, *, overlap_previous: bool = False) -> Tensor:
    """table [vocab, hidden] at token_ids [tokens] int64 -> [tokens, hidden] of `dtype`.

    The ids are not compared with the table here: on CPU torch refuses one outside, on CUDA its row is zeros.

    `overlap_previous`: on Hopper, start up while the previous kernel of the stream still runs.
    """
    if token_ids.ndim != 1 or token_ids.dtype != torch.int64 or not token_ids.is_contiguous():
        raise ValueError(f"token_ids must be contiguous int64 [tokens], not {token_ids.dtype} {list(token_ids.shape)}")
    if table.ndim != 2 or not table.is_contiguous():
        raise ValueError(f"table must be contiguous [vocab, hidden], not {list(table.shape)}")
    if table.device != token_ids.device:
        raise ValueError(f"table is on {table.device}, token_ids on {token_ids.device}")
    if table.is_cuda:
        return embedding_triton(token_ids, table, dtype, overlap_previous=overlap_previous)
    return embedding_torch(token_ids, table, dtype)


def embedding_torch(token_ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The twin of `embedding_triton`."""
    return table[token_ids].to(dtype)


def embedding_triton(token_ids: Tensor, table: Tensor, dtype: torch.dtype, *, overlap_previous: bool = False) -> Tensor:
    """One program for 1,024 elements of a row."""
    tokens, (vocab, hidden) = token_ids.shape[0], table.shape
    out = torch.empty(tokens, hidden, dtype=dtype, device=table.device)
    _embedding[(tokens, -(-hidden // _BLOCK))](
        token_ids,
        table,
        out,
        vocab,
        hidden,
        BLOCK=_BLOCK,
        num_warps=4,
        **launch_options(overlap_previous and is_hopper(table.device)),
    )
    return out


@TritonKernel
@no_type_check
def _embedding(ids_ptr, table_ptr, out_ptr, vocab, hidden, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(ids_ptr + token).to(tl.int64)
    known = (index >= 0) & (index < vocab)
    row = tl.load(table_ptr + index * hidden + column, mask=known & (column < hidden), other=0.0)
    tl.store(out_ptr + token * hidden + column, row.to(out_ptr.dtype.element_ty), mask=column < hidden)

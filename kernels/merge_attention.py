"""Joins attention over two parts of a context by their log-sum-exps."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.attention_plan import check_lse
from kernels.triton_kernel import TritonKernel, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


def merge_attention(
    first: Tensor,
    first_lse: Tensor,
    second: Tensor,
    second_lse: Tensor,
    dtype: torch.dtype,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention over both parts: first, second [tokens, heads, d] -> [tokens, heads, d] of `dtype`.

    first_lse, second_lse [tokens, heads] float32: minus infinity where a part is empty, whose result is not looked at
    then; where both are, the result is zero. `lse`, where it is given, receives that of both parts. The second part's
    tensors may have more rows than the first's. Raises ValueError naming the argument that is wrong.
    """
    for name, part, part_lse in (("first", first, first_lse), ("second", second, second_lse)):
        if part.ndim != 3 or part.shape[1:] != first.shape[1:] or not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous [tokens, heads, d], not {list(part.shape)}")
        if part.shape[0] < first.shape[0]:
            raise ValueError(f"{name} has {part.shape[0]} tokens, first {first.shape[0]}")
        if part_lse.shape != part.shape[:2] or part_lse.dtype != torch.float32 or not part_lse.is_contiguous():
            raise ValueError(f"{name}_lse must be contiguous float32 {list(part.shape[:2])}")
    check_lse(lse, first)
    merge = merge_attention_triton if first.is_cuda else merge_attention_torch
    return merge(first, first_lse, second, second_lse, dtype, lse)


def merge_attention_torch(
    first: Tensor,
    first_lse: Tensor,
    second: Tensor,
    second_lse: Tensor,
    dtype: torch.dtype,
    lse: Tensor | None = None,
) -> Tensor:
    """The twin of `merge_attention_triton`."""
    tokens = first.shape[0]
    both = torch.stack((first_lse, second_lse[:tokens]))  # [2, tokens, heads]
    total = both.logsumexp(0)
    if lse is not None:
        lse.copy_(total)
    weights = (both - total).exp().masked_fill(both.isneginf(), 0.0).unsqueeze(-1)
    parts = torch.stack((first.float(), second[:tokens].float()))
    return torch.where(weights > 0, parts * weights, 0.0).sum(0).to(dtype)


def merge_attention_triton(
    first: Tensor,
    first_lse: Tensor,
    second: Tensor,
    second_lse: Tensor,
    dtype: torch.dtype,
    lse: Tensor | None = None,
) -> Tensor:
    """A program for 16 rows of a head."""
    tokens, heads, d = first.shape
    out = torch.empty(first.shape, dtype=dtype, device=first.device)
    _merge_attention[(-(-tokens * heads // 16),)](
        first,
        first_lse,
        second,
        second_lse,
        out,
        out if lse is None else lse,
        tokens * heads,
        HEAD_DIM=d,
        BLOCK_D=next_power_of_2(d),
        WITH_LSE=lse is not None,
        num_warps=4,
    )
    return out


@TritonKernel
@no_type_check
def _merge_attention(
    first_ptr,
    first_lse_ptr,
    second_ptr,
    second_lse_ptr,
    out_ptr,
    lse_ptr,
    rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    i = tl.arange(0, BLOCK_D)
    a = tl.load(first_lse_ptr + row, mask=row < rows, other=0.0)
    b = tl.load(second_lse_ptr + row, mask=row < rows, other=0.0)
    top = tl.maximum(tl.maximum(a, b), -1.0e30)  # never minus infinity less minus infinity
    a_weight, b_weight = tl.exp(a - top), tl.exp(b - top)
    total = a_weight + b_weight
    some = total > 0
    inside = (row < rows)[:, None] & (i < HEAD_DIM)[None, :]
    at = row[:, None] * HEAD_DIM + i[None, :]
    # What an empty part holds is not read: 0 * NaN would be NaN.
    acc = a_weight[:, None] * tl.load(first_ptr + at, mask=inside & (a_weight > 0)[:, None], other=0.0)
    acc += b_weight[:, None] * tl.load(second_ptr + at, mask=inside & (b_weight > 0)[:, None], other=0.0)
    tl.store(out_ptr + at, acc / tl.where(some, total, 1.0)[:, None], mask=inside)
    if WITH_LSE:
        lse = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + row, lse, mask=row < rows)

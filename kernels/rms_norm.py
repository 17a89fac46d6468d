"""Root-mean-square norm (Zhang and Sennrich 2019), with the residual addition of a decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.capability import is_hopper
from kernels.triton_kernel import TritonKernel, launch_options, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


_ZERO = torch.zeros(())


def rms_norm(x: Tensor, w: Tensor, eps: float, *, overlap_previous: bool = False) -> Tensor:
    """x [.., hidden], w [hidden] -> x / rms(x) * w, in x's dtype; the statistics are float32.

    `overlap_previous`: on Hopper, start up and fetch w while the previous kernel of the stream still runs.
    """
    _check(x, w)
    if x.is_cuda:
        return rms_norm_triton(x, None, w, eps, overlap_previous=overlap_previous)[0]
    return rms_norm_torch(x, w, eps)


def rms_norm_residual(
    x: Tensor, residual: Tensor, w: Tensor, eps: float, *, overlap_previous: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the norm before a layer's next block, and its residual stream."""
    _check(x, w)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, x {x.dtype} {tuple(x.shape)}")
    if x.is_cuda:
        return rms_norm_triton(x, residual, w, eps, overlap_previous=overlap_previous)
    added = x + residual
    return rms_norm_torch(added, w, eps), added


def rms_norm_torch(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """The twin of `rms_norm_triton` without a residual."""
    if x.dtype == w.dtype == torch.float32:
        if x.numel() == w.numel():  # one row of a decode step: 27 us where torch's seven calls take 41
            row = x.flatten()
            scale = (torch.dot(row, row).item() / w.numel() + eps) ** -0.5
            return torch.addcmul(_ZERO, x, w, value=scale)
        return F.rms_norm(x, w.shape, w, eps)
    return F.rms_norm(x.float(), w.shape, w.float(), eps).to(x.dtype)


def rms_norm_triton(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float, *, overlap_previous: bool = False
) -> tuple[Tensor, Tensor]:
    """(normed, x + residual); the second is x itself without a residual. One program a row, which it reads once."""
    x = x.contiguous()
    hidden = x.shape[-1]
    out = torch.empty_like(x)
    added = x if residual is None else torch.empty_like(x)
    _rms_norm[(x.numel() // hidden,)](
        x,
        x if residual is None else residual.contiguous(),
        w,
        out,
        added,
        hidden,
        eps,
        BLOCK=next_power_of_2(hidden),
        RESIDUAL=residual is not None,
        num_warps=16 if hidden > 4096 else 8 if hidden > 2048 else 4,
        **launch_options(overlap_previous and is_hopper(x.device)),
    )
    return out, added


@TritonKernel
@no_type_check
def _rms_norm(
    x_ptr,
    residual_ptr,
    w_ptr,
    out_ptr,
    added_ptr,
    hidden,
    eps,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        # The norm sees the sum as the residual stream holds it.
        x = x.to(added_ptr.dtype.element_ty)
        tl.store(added_ptr + row + column, x, mask=inside)
        x = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / hidden + eps)
    tl.store(out_ptr + row + column, x * scale * w, mask=inside)


def _check(x: Tensor, w: Tensor) -> None:
    if w.shape != x.shape[-1:]:
        raise ValueError(f"w is {tuple(w.shape)}, the last dimension of x {x.shape[-1]}")
    if w.device != x.device:
        raise ValueError(f"w is on {w.device}, x on {x.device}")

"""Which kernels a step runs on: the one place that chooses between plain Triton, cuBLAS and Hopper's own."""

from functools import cache as run_once

import torch
from torch import Tensor


@run_once
def is_hopper(device: torch.device) -> bool:
    """Whether `device` has Hopper's instructions (wgmma, TMA): compute capability 9.0."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def dot_precision() -> str:
    """How the plain kernels multiply float32 matrices, as Triton's name for it: compilers for AMD have no tf32x3."""
    return "ieee" if torch.version.hip else "tf32x3"


def has_hopper_decode(q: Tensor, cache: Tensor, queries: int = 1) -> bool:
    """Whether decode attention of q [seqs * queries, heads, d] over this pool has a Hopper kernel where it lies."""
    if not is_hopper(q.device) or q.dtype != cache.dtype:
        return False
    from kernels.hopper_decode import why_not  # imports Triton

    return not why_not(q.shape[2], cache.shape[4], queries * q.shape[1] // cache.shape[3], q.dtype)


def has_hopper_prefill(q: Tensor, cache: Tensor) -> bool:
    """Whether prefill attention of q [tokens, heads, d] over this pool has a Hopper kernel where it lies."""
    if not is_hopper(q.device) or q.dtype != cache.dtype:
        return False
    from kernels.hopper_prefill import why_not  # imports Triton

    return not why_not(q.shape[2], cache.shape[4], q.dtype)


def has_hopper_linear(x: Tensor, w: Tensor) -> bool:
    """Whether x [.., in] @ w [out, in]^T has a Hopper kernel where it lies: one or two rows, of w's type."""
    if not is_hopper(x.device) or x.dtype != w.dtype:
        return False
    from kernels.hopper_linear import why_not  # imports Triton

    return not why_not(x.numel() // max(x.shape[-1], 1), w)

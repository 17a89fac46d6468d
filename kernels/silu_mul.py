"""The gate of a SwiGLU feed-forward block (Shazeer 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch.nn.functional as F
from torch import Tensor

from kernels.capability import is_hopper
from kernels.triton_kernel import TritonKernel, launch_options

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024


def silu_mul(gate_up: Tensor, *, overlap_previous: bool = False) -> Tensor:
    """gate_up [tokens, 2 * ffn], gate first -> silu(gate) * up [tokens, ffn].

    `overlap_previous`: on Hopper, start up while the previous kernel of the stream still runs.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [tokens, 2 * ffn], not {tuple(gate_up.shape)}")
    if gate_up.is_cuda:
        return silu_mul_triton(gate_up, overlap_previous=overlap_previous)
    return silu_mul_torch(gate_up)


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """The twin of `silu_mul_triton`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def silu_mul_triton(gate_up: Tensor, *, overlap_previous: bool = False) -> Tensor:
    """One program for 1,024 elements of a token; float32 inside."""
    gate_up = gate_up.contiguous()
    tokens, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, ffn)
    _silu_mul[(tokens, -(-ffn // _BLOCK))](
        gate_up,
        out,
        ffn,
        BLOCK=_BLOCK,
        num_warps=4,
        **launch_options(overlap_previous and is_hopper(gate_up.device)),
    )
    return out


@TritonKernel
@no_type_check
def _silu_mul(gate_up_ptr, out_ptr, ffn, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + token * 2 * ffn + i, mask=i < ffn, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * 2 * ffn + ffn + i, mask=i < ffn, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * ffn + i, gate * tl.sigmoid(gate) * up, mask=i < ffn)

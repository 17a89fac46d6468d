"""Matrix products with a weight. On CPU a weight is laid out once, at loading, as the machine reads it fastest.

Measured on one AVX2 core (EPYC 7003, 21 GB/s read), SmolLM2-135M, all weights of a step:

| ms a step                        | 1 row | 8 rows | 32 rows |
|----------------------------------|-------|--------|---------|
| float32, F.linear                |    41 |     85 |     158 |
| float32, prepared (transposed)   |    28 |     79 |     151 |
| bfloat16, F.linear               |    31 |    231 |     904 |
| bfloat16 or float16, prepared    |    20 |     38 |     115 |

Half-width weights go through FBGEMM, which keeps them as float16 and multiplies in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.capability import has_hopper_linear

# Wider blocks of a transposed weight ran into address aliasing at 8 and more rows; narrower ones cost at one row.
_BLOCK = 6144


@dataclass(frozen=True)
class PackedWeight:
    """A [out, in] weight in FBGEMM's float16 tiles. Products take and give float32."""

    packed: Any  # torch.classes.quantized.LinearPackedParamsBase
    out_features: int
    in_features: int


@dataclass(frozen=True)
class BlockedWeight:
    """A float32 [out, in] weight as blocks of rows, each stored transposed: [in, at most 6144], contiguous."""

    blocks: tuple[Tensor, ...]
    out_features: int
    in_features: int


Weight = Tensor | PackedWeight | BlockedWeight


def prepare_weight(w: Tensor) -> Weight:
    """Lay out w [out, in] for `linear`; the caller can drop w. Done once a weight, at loading.

    bfloat16 and float16 become float16 tiles: exact but for bfloat16 values under 2**-14, which are rounded to a
    multiple of 2**-24. Where that would show (a weight whose largest value is itself tiny, or is over float16's
    range), the weight is kept in float32 instead. Off the CPU the weight is returned as it is.
    """
    if w.ndim != 2:
        raise ValueError(f"w must be [out, in], not {tuple(w.shape)}")
    if w.device.type != "cpu" or w.dtype == torch.float64:
        return w
    if w.dtype != torch.float32 and has_float16_tiles() and _fits_float16(w):
        return PackedWeight(torch.ops.quantized.linear_prepack_fp16(w.float(), None), *w.shape)
    # One row reads a wide weight at 23 GB/s transposed and 13 as stored; a tall one is read faster as stored.
    w = w.float()
    if w.shape[0] < w.shape[1]:
        return w.contiguous()
    return BlockedWeight(tuple(block.t().contiguous() for block in torch.split(w, _BLOCK)), *w.shape)


def linear(x: Tensor, w: Weight, bias: Tensor | None = None, *, overlap_previous: bool = False) -> Tensor:
    """x [.., in] @ w [out, in]^T + bias [out] -> [.., out], in x's dtype. w may be any that `prepare_weight` gives.

    `overlap_previous`: on Hopper, for one or two rows, start fetching w while the previous kernel of the stream still
    runs; no kernel that may still run then writes to w.
    """
    in_features = w.shape[1] if isinstance(w, Tensor) else w.in_features
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, w takes {in_features}")
    if isinstance(w, Tensor):
        if w.dtype == x.dtype:
            if x.is_cuda and has_hopper_linear(x, w):
                from kernels.hopper_linear import linear_hopper  # imports Triton

                return linear_hopper(x, w, bias, overlap_previous=overlap_previous)
            return F.linear(x, w, bias)
        out = F.linear(x.to(w.dtype), w)
    elif isinstance(w, PackedWeight):
        out = torch.ops.quantized.linear_dynamic_fp16(x.float(), w.packed)
    else:
        out = _blocked_linear(x.float(), w)
    if bias is not None:
        out = out.add_(bias)
    return out.to(x.dtype)


def _blocked_linear(x: Tensor, w: BlockedWeight) -> Tensor:
    if len(w.blocks) == 1:
        return F.linear(x, w.blocks[0].t())
    rows = x.reshape(-1, w.in_features)
    out = rows.new_empty(rows.shape[0], w.out_features)
    for block, part in zip(w.blocks, torch.split(out, _BLOCK, dim=1), strict=True):
        torch.mm(rows, block, out=part)
    return out.view(*x.shape[:-1], w.out_features)


def has_float16_tiles() -> bool:
    """Whether half-width weights are fast on this CPU: FBGEMM's tiles, on x86 whatever its units."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def _fits_float16(w: Tensor) -> bool:
    largest = w.abs().max().item()
    # At 2**-8 the tiles' smallest step is 2**-16 of the largest value; bfloat16's own is 2**-8 of any.
    return w.dtype == torch.float16 or 2.0**-8 <= largest <= torch.finfo(torch.float16).max

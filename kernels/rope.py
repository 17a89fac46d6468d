"""Rotary position embedding (Su et al. 2021), half-split ("neox") convention as in Hugging Face models."""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from kernels.triton_kernel import TritonKernel, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl


def rope_tables(inv_freq: Tensor, max_positions: int) -> tuple[Tensor, Tensor]:
    """inv_freq [d/2] -> (cos, sin), each [max_positions, d] float32. A token's rows are `cos[positions]`.

    Both halves of a row hold the same angles; in the first half of `sin` the sign is turned, so that
    x * cos + swap(x) * sin rotates, where swap exchanges the halves of x.
    """
    positions = torch.arange(max_positions, dtype=torch.float32, device=inv_freq.device)
    angles = torch.outer(positions, inv_freq.float())
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q [tokens, heads, d] and k [tokens, kv_heads, d] by the tokens' rows of `rope_tables`, in q's dtype.

    cos, sin [tokens, d] float32. Element i of a head's first half and element i of its second are a pair. Computed in
    float32.
    """
    tokens_d = q.shape[::2]
    if k.shape[::2] != tokens_d or k.dtype != q.dtype:
        raise ValueError(f"k is {k.dtype} {tuple(k.shape)}, q {q.dtype} {tuple(q.shape)}")
    if cos.shape != tokens_d or sin.shape != tokens_d:
        raise ValueError(f"cos and sin must be {tuple(tokens_d)}, not {tuple(cos.shape)} and {tuple(sin.shape)}")
    return rope_triton(q, k, cos, sin) if q.is_cuda else rope_torch(q, k, cos, sin)


def rope_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of `rope_triton`. q and k go together: at one token the calls cost more than the arithmetic."""
    x = torch.cat((q, k), 1).float()
    y = torch.addcmul(x * cos.unsqueeze(1), x.roll(q.shape[2] // 2, -1), sin.unsqueeze(1)).to(q.dtype)
    return y.narrow(1, 0, q.shape[1]), y.narrow(1, q.shape[1], k.shape[1])


def rope_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """One program a token; q and k may be views of a fused projection (last dimension contiguous)."""
    tokens, heads, d = q.shape
    kv_heads = k.shape[1]
    if q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError("q and k must be contiguous in their last dimension")
    out = q.new_empty(tokens, heads + kv_heads, d)
    _rope[(tokens,)](
        q,
        k,
        cos.contiguous(),
        sin.contiguous(),
        out,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=d // 2,
        BLOCK_HEADS=next_power_of_2(heads + kv_heads),
        BLOCK_HALF=next_power_of_2(d // 2),
        num_warps=4,
    )
    return out.narrow(1, 0, heads), out.narrow(1, heads, kv_heads)


@TritonKernel
@no_type_check
def _rope(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    is_q = (head < HEADS) & (i < HALF)
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS) & (i < HALF)
    q = q_ptr + token * q_token_stride + head * q_head_stride + i
    k = k_ptr + token * k_token_stride + (head - HEADS) * k_head_stride + i
    a = tl.load(q, mask=is_q, other=0.0).to(tl.float32) + tl.load(k, mask=is_k, other=0.0).to(tl.float32)
    b = tl.load(q + HALF, mask=is_q, other=0.0).to(tl.float32) + tl.load(k + HALF, mask=is_k, other=0.0).to(tl.float32)
    angle = token * 2 * HALF + HALF + i  # the second half of a row, where sin has its own sign
    cos = tl.load(cos_ptr + angle, mask=i < HALF, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=i < HALF, other=0.0)
    out = out_ptr + (token * (HEADS + KV_HEADS) + head) * (2 * HALF) + i
    tl.store(out, a * cos - b * sin, mask=is_q | is_k)
    tl.store(out + HALF, b * cos + a * sin, mask=is_q | is_k)

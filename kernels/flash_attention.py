"""FlashAttention (Dao et al. 2022, and 2023 for the order of the loops) as published: exact attention that trains.

Scores and probabilities never leave a program. Forward keeps, beside its result, the log-sum-exp of each row; backward
computes the probabilities from it again. Of dropout only seed and offset are kept: whether a probability is dropped is
a number of Philox at the probability's own place, so backward finds the same ones. Speed is not what this is for:
serving runs `prefill_attention` and `decode_attention`.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.capability import dot_precision
from kernels.philox import philox4x32
from kernels.triton_kernel import next_power_of_2


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, dropout_p: float = 0.0, seed: int = 0, offset: int = 0
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, with gradients: q [batch, heads, queries, d], k and v [batch, kv_heads, keys, d] ->
    [batch, heads, queries, d] in q's dtype.

    heads is a multiple of kv_heads, d at most 256. `causal`: the last query sees all keys, the one before it one less;
    a query that sees none gives zeros. `dropout_p`, in [0, 1): a probability is dropped so often, and those that are
    left grow by 1 / (1 - dropout_p); seed (64 bits) and offset (31 bits) say which. Raises ValueError naming the
    argument that is wrong.
    """
    _check(q, k, v, dropout_p, seed, offset)
    if q.is_cuda:
        return flash_attention_triton(q, k, v, causal=causal, dropout_p=dropout_p, seed=seed, offset=offset)
    keep = keep_mask((*q.shape[:3], k.shape[2]), dropout_p, seed, offset) if dropout_p else None
    return attention_torch(q, k, v, causal=causal, keep=keep, dropout_p=dropout_p)


def attention_torch(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, keep: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """The twin of `flash_attention_triton`, with every score in memory. keep [batch, heads, queries, keys] bool."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * q.shape[3] ** -0.5  # [batch, heads, queries, keys]
    unseen = torch.zeros(scores.shape[2:], dtype=torch.bool, device=q.device)
    if causal:
        unseen = ~torch.ones_like(unseen).tril(k.shape[2] - q.shape[2])
    blind = unseen.all(-1, keepdim=True)  # a softmax over nothing would be NaN
    p = scores.masked_fill(unseen & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0.0)
    if keep is not None:
        p = torch.where(keep, p / (1 - dropout_p), 0.0)
    out: Tensor = p @ v
    return out


def keep_mask(shape: tuple[int, int, int, int], dropout_p: float, seed: int, offset: int) -> Tensor:
    """Which probabilities [batch, heads, queries, keys] dropout leaves: bool, on the CPU."""
    batch, heads, queries, keys = shape
    head, row, column = torch.meshgrid(*map(torch.arange, (batch * heads, queries, keys)), indexing="ij")
    low, high = (torch.full_like(row, seed >> shift & 0xFFFFFFFF) for shift in (0, 32))
    words = philox4x32(column, row, head, torch.full_like(row, offset), low, high)
    keep: Tensor = words[0] >= _dropped(dropout_p)
    return keep.view(shape)


def _dropped(dropout_p: float) -> int:
    """How many of the 2^32 numbers drop a probability."""
    return round(dropout_p * 2**32)


def flash_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, dropout_p: float = 0.0, seed: int = 0, offset: int = 0
) -> Tensor:
    """The algorithm itself: a program for a tile of queries and a head; in backward, one for a tile of keys too."""
    signed_seed = seed - (seed >> 63 << 64)
    dropout = (signed_seed, offset, _dropped(dropout_p), 1 / (1 - dropout_p))
    out: Tensor = _FlashAttention.apply(  # type: ignore[no-untyped-call]
        q.contiguous(), k.contiguous(), v.contiguous(), causal, dropout
    )
    return out


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: tuple[int, int, int, float]
    ) -> Tensor:
        from kernels.flash_attention_kernels import forward_kernel

        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        constants = _constants(q, k, causal, dropout)
        forward_kernel[_tiles(q, constants)](
            q, k, v, out, lse, q.shape[2], k.shape[2], q.shape[3] ** -0.5, *dropout, **constants
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.dropout, ctx.constants = dropout, constants
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        from kernels.flash_attention_kernels import backward_kv_kernel, backward_q_kernel

        q, k, v, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        # What a softmax's gradient takes from each of a row's: the sum of dP * P, which is that of dO * O.
        delta = (grad.float() * out.float()).sum(-1)  # [batch, heads, queries]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = (q, k, v, grad, lse, delta)
        sizes = (q.shape[2], k.shape[2], q.shape[3] ** -0.5, *ctx.dropout)
        backward_q_kernel[_tiles(q, ctx.constants)](*given, dq, *sizes, **ctx.constants)
        backward_kv_kernel[_tiles(k, ctx.constants)](*given, dk, dv, *sizes, **ctx.constants)
        return dq, dk, dv, None, None


def _constants(q: Tensor, k: Tensor, causal: bool, dropout: tuple[int, int, int, float]) -> dict[str, Any]:
    d = q.shape[3]
    wide = d * q.element_size() > 512  # tiles of 32 rows would not fit a program's registers
    return {
        "HEADS": q.shape[1],
        "KV_HEADS": k.shape[1],
        "HEAD_DIM": d,
        "BLOCK_D": max(16, next_power_of_2(d)),
        "BLOCK": 16 if wide else 32,
        "CAUSAL": causal,
        "DROPOUT": dropout[2] > 0,
        "DOT": dot_precision(),
        "num_warps": 4 if wide else 8,
        "num_stages": 1,
    }


def _tiles(x: Tensor, constants: dict[str, Any]) -> tuple[int, int]:
    """x [batch, heads, tokens, d] -> the grid: tiles of tokens, heads of all the batch."""
    return -(-x.shape[2] // constants["BLOCK"]), x.shape[0] * x.shape[1]


def _check(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, seed: int, offset: int) -> None:
    if q.ndim != 4 or q.numel() == 0 or q.shape[3] > 256 or not q.is_floating_point():
        raise ValueError(f"q must be [batch, heads, queries, d] with d at most 256, not {q.dtype} {tuple(q.shape)}")
    if k.ndim != 4 or k.shape[::3] != q.shape[::3] or k.numel() == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q {q.dtype} on {q.device}")
    if v.shape != k.shape:
        raise ValueError(f"v is {tuple(v.shape)}, k {tuple(k.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}: a number from 0 to below 1 is wanted")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: 0 to 2^64 - 1 is wanted")
    if not 0 <= offset < 2**31:
        raise ValueError(f"offset is {offset}: 0 to 2^31 - 1 is wanted")

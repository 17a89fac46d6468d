# mypy: disable-error-code="untyped-decorator"
"""The kernels of `flash_attention`; their tensors are contiguous [batch, heads, tokens, d], statistics [.., tokens].

P is what softmax gives, Z what dropout makes of it (0, or P / (1 - p)), S the scores; d before a name is the gradient.
"""

from typing import no_type_check

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are to base 2


@triton.jit
@no_type_check
def _tile(ptr, head, first, tokens, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(pointers, mask) of BLOCK tokens of a head, from `first` on."""
    token = first + tl.arange(0, BLOCK)
    i = tl.arange(0, BLOCK_D)
    pointers = ptr + (head * tokens + token)[:, None] * HEAD_DIM + i[None, :]
    return pointers, (token < tokens)[:, None] & (i < HEAD_DIM)[None, :]


@triton.jit
@no_type_check
def _load(ptr, head, first, tokens, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, inside = _tile(ptr, head, first, tokens, HEAD_DIM, BLOCK, BLOCK_D)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _dot(a, b, DOT: tl.constexpr):
    return tl.dot(a.to(b.dtype), b, input_precision=DOT)


@triton.jit
@no_type_check
def _scores(q, k, m, n, queries, keys, scale, CAUSAL: tl.constexpr, DOT: tl.constexpr):
    """S times log2(e), of queries m and keys n; -inf where a query does not see a key."""
    s = _dot(q, tl.trans(k), DOT) * (scale * LOG2_E)
    seen = (m < queries)[:, None] & (n < keys)[None, :]
    if CAUSAL:
        seen = seen & ((n - keys)[None, :] <= (m - queries)[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
@no_type_check
def _factors(head, m, n, seed, offset, dropped, grown):
    """Z / P of queries m and keys n: 0 or `grown`, by a number of Philox at the place of each."""
    zero = tl.zeros([m.shape[0], n.shape[0]], tl.uint32)
    row = zero + m[:, None].to(tl.uint32)
    column = zero + n[None, :].to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, column, row, zero + head.to(tl.uint32), zero + offset.to(tl.uint32))
    return tl.where(bits.to(tl.int64) >= dropped, grown, 0.0)


@triton.jit(do_not_specialize=["seed", "offset", "dropped"])
@no_type_check
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    queries,
    keys,
    scale,
    seed,
    offset,
    dropped,
    grown,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
):
    """A tile of queries goes through the keys with a running maximum and sum."""
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    m = first + tl.arange(0, BLOCK)
    q = _load(q_ptr, head, first, queries, HEAD_DIM, BLOCK, BLOCK_D)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    end = tl.minimum(keys, keys - queries + first + BLOCK) if CAUSAL else keys
    for start in range(0, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        k = _load(k_ptr, kv_head, start, keys, HEAD_DIM, BLOCK, BLOCK_D)
        v = _load(v_ptr, kv_head, start, keys, HEAD_DIM, BLOCK, BLOCK_D)
        s = _scores(q, k, m, n, queries, keys, scale, CAUSAL, DOT)
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # A row that has seen no key yet: its -inf must not become -inf - -inf.
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)  # of all, the dropped ones too
        if DROPOUT:
            p *= _factors(head, m, n, seed, offset, dropped, grown)
        acc = acc * shrink[:, None] + _dot(p, v, DOT)
        top = new_top
    pointers, inside = _tile(out_ptr, head, first, queries, HEAD_DIM, BLOCK, BLOCK_D)
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(pointers, acc / divisor[:, None], mask=inside)
    # +inf for a row without a key: its probabilities come out as 0 in backward.
    lse = tl.where(total > 0, (top + tl.log2(divisor)) / LOG2_E, float("inf"))
    tl.store(lse_ptr + head * queries + m, lse, mask=m < queries)


@triton.jit
@no_type_check
def _gradients(
    q, k, v, grad, lse, delta, m, n, head, queries, keys, scale, seed, offset, dropped, grown,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(Z, dS) of queries m and keys n."""
    p = tl.exp2(_scores(q, k, m, n, queries, keys, scale, CAUSAL, DOT) - lse[:, None] * LOG2_E)
    z, dp = p, _dot(grad, tl.trans(v), DOT)
    if DROPOUT:
        factors = _factors(head, m, n, seed, offset, dropped, grown)
        z, dp = p * factors, dp * factors
    return z, p * (dp - delta[:, None]) * scale


@triton.jit(do_not_specialize=["seed", "offset", "dropped"])
@no_type_check
def backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    queries,
    keys,
    scale,
    seed,
    offset,
    dropped,
    grown,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
):
    """A tile of queries goes through the keys again: dQ = dS K."""
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    m = first + tl.arange(0, BLOCK)
    q = _load(q_ptr, head, first, queries, HEAD_DIM, BLOCK, BLOCK_D)
    grad = _load(grad_ptr, head, first, queries, HEAD_DIM, BLOCK, BLOCK_D)
    lse = tl.load(lse_ptr + head * queries + m, mask=m < queries, other=float("inf"))
    delta = tl.load(delta_ptr + head * queries + m, mask=m < queries, other=0.0)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    end = tl.minimum(keys, keys - queries + first + BLOCK) if CAUSAL else keys
    for start in range(0, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        k = _load(k_ptr, kv_head, start, keys, HEAD_DIM, BLOCK, BLOCK_D)
        v = _load(v_ptr, kv_head, start, keys, HEAD_DIM, BLOCK, BLOCK_D)
        _, ds = _gradients(
            q, k, v, grad, lse, delta, m, n, head, queries, keys, scale, seed, offset, dropped, grown,
            CAUSAL, DROPOUT, DOT,
        )  # fmt: skip
        dq += _dot(ds, k, DOT)
    pointers, inside = _tile(dq_ptr, head, first, queries, HEAD_DIM, BLOCK, BLOCK_D)
    tl.store(pointers, dq, mask=inside)


@triton.jit(do_not_specialize=["seed", "offset", "dropped"])
@no_type_check
def backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    queries,
    keys,
    scale,
    seed,
    offset,
    dropped,
    grown,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
):
    """A tile of keys goes through the queries of all heads that share it: dV = Z^T dO, dK = dS^T Q."""
    first = tl.program_id(0) * BLOCK
    kv_head = tl.program_id(1).to(tl.int64)
    n = first + tl.arange(0, BLOCK)
    k = _load(k_ptr, kv_head, first, keys, HEAD_DIM, BLOCK, BLOCK_D)
    v = _load(v_ptr, kv_head, first, keys, HEAD_DIM, BLOCK, BLOCK_D)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    begin = tl.maximum(first + queries - keys, 0) // BLOCK * BLOCK if CAUSAL else 0
    for member in range(HEADS // KV_HEADS):
        head = kv_head * (HEADS // KV_HEADS) + member
        for start in range(begin, queries, BLOCK):
            m = start + tl.arange(0, BLOCK)
            q = _load(q_ptr, head, start, queries, HEAD_DIM, BLOCK, BLOCK_D)
            grad = _load(grad_ptr, head, start, queries, HEAD_DIM, BLOCK, BLOCK_D)
            lse = tl.load(lse_ptr + head * queries + m, mask=m < queries, other=float("inf"))
            delta = tl.load(delta_ptr + head * queries + m, mask=m < queries, other=0.0)
            z, ds = _gradients(
                q, k, v, grad, lse, delta, m, n, head, queries, keys, scale, seed, offset, dropped, grown,
                CAUSAL, DROPOUT, DOT,
            )  # fmt: skip
            dv += _dot(tl.trans(z), grad, DOT)
            dk += _dot(tl.trans(ds), q, DOT)
    pointers, inside = _tile(dk_ptr, kv_head, first, keys, HEAD_DIM, BLOCK, BLOCK_D)
    tl.store(pointers, dk, mask=inside)
    pointers, inside = _tile(dv_ptr, kv_head, first, keys, HEAD_DIM, BLOCK, BLOCK_D)
    tl.store(pointers, dv, mask=inside)

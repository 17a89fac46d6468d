"""Attention of one or a few queries a sequence over paged KV: flash decoding (Dao et al. 2023), split-KV on the GPU."""

import torch
from torch import Tensor

from kernels.attention_options import check_options
from kernels.attention_plan import AttentionPlan, check_lse
from kernels.capability import has_hopper_decode
from kernels.decode_scores import DecodeScores
from kernels.decode_split import decode_split


def decode_attention(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    lse: Tensor | None = None,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """The queries of the first `plan.num_decodes` sequences, q [tokens, heads, d] -> the same shape in q's dtype.

    cache [pages, layers, 2, kv_heads, page_size, d]; `window` and `soft_cap` as in `paged_attention`. `lse` [tokens,
    heads] float32, where it is given, receives the log of each softmax's sum of exponentials: what merging with another
    part of the context needs.
    """
    plan.check(q, cache, layer, plan.decode_tokens)
    check_options(window, soft_cap)
    check_lse(lse, q)
    if has_hopper_decode(q, cache, plan.decode_queries):
        from kernels.hopper_decode import decode_attention_hopper

        return decode_attention_hopper(q, cache, layer, plan, lse, window=window, soft_cap=soft_cap)
    if q.is_cuda:
        return decode_attention_triton(q, cache, layer, plan, lse, window=window, soft_cap=soft_cap)
    return decode_attention_torch(q, cache, layer, plan, lse, window=window, soft_cap=soft_cap)


def decode_attention_torch(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    lse: Tensor | None = None,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """The twin of `decode_attention_triton`, and the CPU backend: scores and sums straight from the pages.

    Two calls read the pool by row numbers, without a copy of K or V: `sampled_addmm` computes the dot products at
    given places of q @ K^T, `embedding_bag` adds weighted rows of V. One AVX2 core, 30 layers of 9/3 heads of 64,
    float32, ms a step against a gather and one SDPA a sequence: 1 x 600 tokens 4.0 (6.7), 8 sequences of 100-600
    16 (51), 32 of 100-600 57 (194); pages as splits with a merge were slower than either (15, 60, 361).
    """
    heads, d = q.shape[1:]
    key = ("scores", heads, cache.shape, cache.dtype, window)
    scores = plan.once(key, lambda: DecodeScores(plan, cache, heads, window))
    k, v = scores.keys_and_values(cache, layer)
    torch.sparse.sampled_addmm(
        scores.sparse, q.reshape(-1, d).float(), k.t(), beta=0.0, alpha=d**-0.5, out=scores.sparse
    )
    if soft_cap:
        scores.values.div_(soft_cap).tanh_().mul_(soft_cap)
    for i, row in enumerate(scores.by_token):  # ragged: one short call a token beat padding
        if lse is not None:
            torch.logsumexp(row, -1, out=lse[i])
        torch.softmax(row, -1, out=row)
    out = torch.embedding_bag(v, scores.rows, scores.bags, False, 0, False, scores.values)[0]  # 0: sum
    return out.view(q.shape).to(q.dtype)


def decode_attention_triton(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    lse: Tensor | None = None,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Split-KV: programs for (sequence, KV head, part of the context) and a merge by log-sum-exp.

    A KV head's query heads, of all queries of a sequence, share a program: K and V are read once for them.
    """
    seqs = plan.num_decodes
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode_split(
        q, cache, layer, plan.page_table[:seqs], plan.context_lens[:seqs], out, lse,
        longest=max(plan.contexts[:seqs]), window=window, soft_cap=soft_cap, batch_invariant=plan.batch_invariant,
    )  # fmt: skip
    return out

"""Decode attention of many sequences over one common prefix, which is read once for all of them (cascade).

Every query attends to the prefix in one dense pass, then to its own sequence's suffix; the two results are joined by
their log-sum-exps (Juravsky et al. 2024, "Hydragen"; Ye et al. 2024, "Cascade Inference").
"""

import torch
from torch import Tensor

from kernels.attention_options import check_options
from kernels.attention_plan import AttentionPlan, check_lse
from kernels.capability import has_hopper_decode
from kernels.decode_attention import decode_attention_torch
from kernels.decode_split import decode_split
from kernels.merge_attention import merge_attention


def cascade_attention(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    prefix: int,
    lse: Tensor | None = None,
    *,
    soft_cap: float = 0.0,
) -> Tensor:
    """As `decode_attention`, of sequences whose first `prefix` tokens lie in the same pages.

    prefix: a multiple of the page size, at most what the shortest context has before its queries; the rows of
    plan.page_table begin with the same prefix / page_size pages. Raises ValueError naming the argument that is wrong.
    """
    plan.check(q, cache, layer, plan.decode_tokens)
    check_options(0, soft_cap)
    _check_prefix(plan, prefix)
    check_lse(lse, q)
    if has_hopper_decode(q, cache, plan.decode_queries):
        from kernels.hopper_cascade import cascade_attention_hopper

        return cascade_attention_hopper(q, cache, layer, plan, prefix, lse, soft_cap=soft_cap)
    if q.is_cuda:
        return cascade_attention_triton(q, cache, layer, plan, prefix, lse, soft_cap=soft_cap)
    return cascade_attention_torch(q, cache, layer, plan, prefix, lse, soft_cap=soft_cap)


def _check_prefix(plan: AttentionPlan, prefix: int) -> None:
    seqs = plan.num_decodes
    if prefix < 0 or prefix % plan.page_size:
        raise ValueError(f"prefix {prefix} is not a multiple of the page size {plan.page_size}")
    if prefix > min(plan.contexts[:seqs]) - plan.decode_queries:
        raise ValueError(f"prefix {prefix}: a context of {min(plan.contexts[:seqs])} tokens does not go beyond it")
    if not plan.trusted:
        table = plan.page_table[:seqs, : prefix // plan.page_size]
        if not plan.once(("shared", prefix), lambda: bool((table == table[:1]).all())):
            raise ValueError(f"prefix {prefix}: the rows of page_table do not begin with the same pages")


def cascade_attention_torch(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    prefix: int,
    lse: Tensor | None = None,
    *,
    soft_cap: float = 0.0,
) -> Tensor:
    """The twin of `cascade_attention_triton`, and the CPU backend: the prefix is gathered once."""
    tokens, heads, d = q.shape
    kv_heads = cache.shape[3]
    kv = cache[plan.page_table[0, : prefix // plan.page_size].long(), layer]  # [pages, 2, kv_heads, page_size, d]
    k, v = kv.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, prefix, d).float()
    rows = q.float().view(tokens, kv_heads, -1, d).transpose(0, 1).flatten(1, 2)  # [kv_heads, tokens * group, d]
    scores = rows @ k.transpose(1, 2) * d**-0.5  # [kv_heads, tokens * group, prefix]
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    of_prefix = (scores.softmax(-1) @ v).view(kv_heads, tokens, -1, d).transpose(0, 1).reshape(q.shape)
    prefix_lse = scores.logsumexp(-1).view(kv_heads, tokens, -1).transpose(0, 1).reshape(tokens, heads)
    suffix_lse = torch.empty(tokens, heads)
    suffixes = plan.once(("suffixes", prefix), lambda: _suffixes(plan, prefix))
    of_suffix = decode_attention_torch(q.float(), cache, layer, suffixes, suffix_lse, soft_cap=soft_cap)
    return merge_attention(of_prefix, prefix_lse, of_suffix, suffix_lse, q.dtype, lse)


def _suffixes(plan: AttentionPlan, prefix: int) -> AttentionPlan:
    """The decodes of a plan, without the prefix."""
    seqs = plan.num_decodes
    return AttentionPlan(
        plan.page_table[:seqs, prefix // plan.page_size :].contiguous(),
        plan.query_starts[: seqs + 1],
        plan.context_lens[:seqs] - prefix,
        seqs,
        plan.page_size,
        decode_queries=plan.decode_queries,
    )


def cascade_attention_triton(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    prefix: int,
    lse: Tensor | None = None,
    *,
    soft_cap: float = 0.0,
) -> Tensor:
    """The prefix as one sequence that all queries see whole, the suffixes, and a merge."""
    seqs = plan.num_decodes
    shared = plan.once(("prefix", prefix), lambda: plan.context_lens.new_full((1,), prefix))
    of_prefix, of_suffix = torch.empty(2, *q.shape, dtype=torch.float32, device=q.device)
    prefix_lse, suffix_lse = torch.empty(2, *q.shape[:2], dtype=torch.float32, device=q.device)
    decode_split(
        q, cache, layer, plan.page_table[:1], shared, of_prefix, prefix_lse,
        longest=prefix, soft_cap=soft_cap, causal=False,
    )  # fmt: skip
    decode_split(
        q, cache, layer, plan.page_table[:seqs], plan.context_lens[:seqs], of_suffix, suffix_lse,
        longest=max(plan.contexts[:seqs]) - prefix, soft_cap=soft_cap, skip=shared,
    )  # fmt: skip
    return merge_attention(of_prefix, prefix_lse, of_suffix, suffix_lse, q.dtype, lse)

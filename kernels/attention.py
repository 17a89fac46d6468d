"""Attention over paged KV for one step's mixed batch: decode rows first, prefill chunks after them."""

import torch
from torch import Tensor

from kernels.attention_plan import AttentionPlan
from kernels.decode_attention import decode_attention
from kernels.decode_plan import DecodePlan
from kernels.prefill_attention import prefill_attention
from kernels.prefill_plan import PrefillPlan

__all__ = ["AttentionPlan", "DecodePlan", "PrefillPlan", "paged_attention"]


def paged_attention(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan | DecodePlan | PrefillPlan,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Causal attention of all the plan's queries; the new keys and values are in their pages already.

    q [tokens, heads, d], cache [pages, layers, 2, kv_heads, page_size, d] -> [tokens, heads, d] in q's dtype.
    heads is a multiple of kv_heads. The softmax is float32. `window` and `soft_cap`: see `check_options`; a
    `PrefillPlan` is for layers without either, and raises ValueError where there is one.
    """
    if isinstance(plan, DecodePlan):
        return plan.attend(q, cache, layer, window, soft_cap)
    if isinstance(plan, PrefillPlan):
        if window or soft_cap:
            raise ValueError(f"window {window}, soft_cap {soft_cap}: a PrefillPlan has neither")
        return plan.attend(q, cache, layer)
    tokens = plan.decode_tokens
    if tokens == plan.num_tokens:
        return decode_attention(q, cache, layer, plan, window=window, soft_cap=soft_cap)
    if tokens == 0:
        return prefill_attention(q, cache, layer, plan, window=window, soft_cap=soft_cap)
    decoded = decode_attention(q[:tokens], cache, layer, plan, window=window, soft_cap=soft_cap)
    return torch.cat((decoded, prefill_attention(q[tokens:], cache, layer, plan, window=window, soft_cap=soft_cap)))

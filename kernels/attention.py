"""Attention over paged KV for one step's mixed batch: decode rows first, prefill chunks after them."""

import torch
from torch import Tensor

from kernels.attention_plan import AttentionPlan
from kernels.decode_attention import decode_attention
from kernels.prefill_attention import prefill_attention

__all__ = ["AttentionPlan", "paged_attention"]


def paged_attention(q: Tensor, cache: Tensor, layer: int, plan: AttentionPlan) -> Tensor:
    """Causal attention of all the plan's queries; the new keys and values are in their pages already.

    q [tokens, heads, d], cache [pages, layers, 2, kv_heads, page_size, d] -> [tokens, heads, d] in q's dtype.
    heads is a multiple of kv_heads. The softmax is float32.
    """
    decodes = plan.num_decodes
    if decodes == len(plan.queries):
        return decode_attention(q, cache, layer, plan)
    if decodes == 0:
        return prefill_attention(q, cache, layer, plan)
    return torch.cat(
        (decode_attention(q[:decodes], cache, layer, plan), prefill_attention(q[decodes:], cache, layer, plan))
    )

"""Cascade decode attention for Hopper: what `cascade_attention` runs there, and CUDA graphs use."""

import torch
from torch import Tensor

from kernels.attention_options import check_options
from kernels.attention_plan import AttentionPlan
from kernels.hopper_decode import BESIDE, LEADING, launch_decode
from kernels.hopper_decode_merge import merge_parts
from kernels.hopper_decode_schedule import TILE, DecodeSchedule
from kernels.triton_kernel import next_power_of_2


class CascadeSchedule:
    """Who computes what in one step over a common prefix; all layers share it.

    context_lens [seqs] int32, on the device: tokens of each sequence, the prefix and its queries included.
    prefix_len [1] int32, on the device: tokens that all of them begin with, in the same pages; 0: none.
    queries: of each sequence, the tail of its context.

    A sequence that ends with the prefix, or before it, gets the prefix's part alone: in a graph's padding rows nobody
    looks at it. `refresh` as in `DecodeSchedule`. Raises ValueError naming the argument that is wrong.
    """

    def __init__(
        self, context_lens: Tensor, prefix_len: Tensor, heads: int, kv_heads: int, head_dim: int, *, queries: int = 1
    ) -> None:
        self.suffix = DecodeSchedule(context_lens, heads, kv_heads, head_dim, queries=queries, skip=prefix_len)
        tokens = context_lens.shape[0] * queries
        # Queries in a tile: whose they are makes no difference to the prefix.
        packed = min(TILE * kv_heads // heads, next_power_of_2(tokens))
        self.prefix_len = prefix_len
        self._prefix_lens = prefix_len.repeat(-(-tokens // packed))  # [tiles]
        self.prefix = DecodeSchedule(self._prefix_lens, heads, kv_heads, head_dim, queries=packed, causal=False)

    def refresh(self) -> None:
        """Share the work out by the lengths that the device holds now."""
        self._prefix_lens.copy_(self.prefix_len.expand_as(self._prefix_lens))
        self.prefix.refresh()
        self.suffix.refresh()


def cascade_attention_hopper(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    prefix: int,
    lse: Tensor | None = None,
    *,
    soft_cap: float = 0.0,
) -> Tensor:
    """As `cascade_attention_triton`, for the shapes that `hopper_decode.why_not` names nothing against."""
    seqs = plan.num_decodes
    shape = (q.shape[1], cache.shape[3], q.shape[2])
    schedule = plan.once(("hopper cascade", *shape, prefix), lambda: _schedule(plan, prefix, *shape))
    return cascade_pages(q, cache, layer, plan.page_table[:seqs], schedule, lse, soft_cap=soft_cap)


def _schedule(plan: AttentionPlan, prefix: int, heads: int, kv_heads: int, head_dim: int) -> CascadeSchedule:
    lens = plan.context_lens[: plan.num_decodes]
    shared = lens.new_full((1,), prefix)
    return CascadeSchedule(lens, shared, heads, kv_heads, head_dim, queries=plan.decode_queries)


def cascade_pages(
    q: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    schedule: CascadeSchedule,
    lse: Tensor | None = None,
    *,
    soft_cap: float = 0.0,
) -> Tensor:
    """q [seqs * queries, heads, d] -> the same shape; lengths are those of the schedule's last refresh.

    page_table [seqs, pages]: its rows begin with the same pages as far as the prefix goes. Nothing is read back from
    the device, so neither that nor its entries are checked here.
    """
    check_options(0, soft_cap)
    prefix, suffix = schedule.prefix, schedule.suffix
    rest = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    rest_lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shared = page_table[:1].expand(prefix.shape[0], -1)
    # One is bound by arithmetic, the other by memory. Beside the first the second needs to wait for nothing: what was
    # before the first has ended when that starts, as it is launched in the common way.
    launch_decode(q, cache, layer, shared, prefix, None, None, overlap=LEADING, soft_cap=soft_cap)
    launch_decode(q, cache, layer, page_table, suffix, rest, rest_lse, overlap=BESIDE, soft_cap=soft_cap)
    merge_parts(prefix, out, lse, rest, rest_lse, soft_cap=soft_cap)
    return out

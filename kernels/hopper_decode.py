"""Paged flash decoding for Hopper: what `decode_attention` runs there for the shapes it takes, and CUDA graphs use."""

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention_options import check_options
from kernels.attention_plan import AttentionPlan, check_lse
from kernels.hopper_decode_kernel import decode_kernel
from kernels.hopper_decode_merge import merge_parts
from kernels.hopper_decode_schedule import SPLIT, TILE, UNIT, DecodeSchedule
from kernels.hopper_pool import SWIZZLE, check_pool
from kernels.triton_kernel import next_power_of_2

__all__ = ["DecodeSchedule", "decode_attention_hopper", "decode_pages"]

LOG2_E = 1.4426950408889634
# How a launch stands to its neighbours in the stream: by itself; begun before the previous kernel has ended; letting
# the next one run beside it; running beside such a one.
ALONE, EARLY, LEADING, BESIDE = range(4)


def why_not(head_dim: int, page_size: int, rows: int, dtype: torch.dtype) -> str:
    """Why this shape needs the plain kernel; empty where this one takes it.

    rows: query heads that share a KV head, times the queries of a sequence.
    """
    if head_dim not in (64, 128):
        return f"head_dim {head_dim} is neither 64 nor 128"
    if page_size not in (16, 64, 128):
        return f"page_size {page_size} is not 16, 64 or 128"
    if rows > TILE:
        return f"{rows} query heads share a KV head, {TILE} at most fit a tile"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is not a 16-bit type"
    return ""


def decode_attention_hopper(
    q: Tensor,
    cache: Tensor,
    layer: int,
    plan: AttentionPlan,
    lse: Tensor | None = None,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """As `decode_attention_triton`, for the shapes that `why_not` names nothing against."""
    shape = (q.shape[1], cache.shape[3], q.shape[2])
    schedule = plan.once(("hopper decode", *shape, window), lambda: _schedule(plan, *shape, window))
    return decode_pages(q, cache, layer, plan.page_table[: plan.num_decodes], schedule, lse, soft_cap=soft_cap)


def _schedule(plan: AttentionPlan, heads: int, kv_heads: int, head_dim: int, window: int) -> DecodeSchedule:
    contexts = plan.contexts[: plan.num_decodes]
    schedule = DecodeSchedule(
        plan.context_lens[: len(contexts)],
        heads,
        kv_heads,
        head_dim,
        queries=plan.decode_queries,
        window=window,
        batch_invariant=plan.batch_invariant,
    )
    units = sum(-(-context // UNIT) for context in contexts) * kv_heads
    if units * schedule.programs >= 2**31:  # the kernels multiply them in 32 bits
        raise ValueError(f"context_lens: {sum(contexts)} tokens of {kv_heads} KV heads are too many for one step")
    return schedule


def decode_pages(
    q: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    schedule: DecodeSchedule,
    lse: Tensor | None = None,
    *,
    overlap_previous: bool = False,
    soft_cap: float = 0.0,
) -> Tensor:
    """q [seqs * queries, heads, d] -> the same shape; lengths and queries a sequence are those of the schedule.

    page_table [seqs, pages]; lse [seqs * queries, heads] float32, where it is given, receives each softmax's
    log-sum-exp. Sequences of length 0 get zeros, and a log-sum-exp of minus infinity. `window` is the schedule's;
    `soft_cap` as in `paged_attention`.

    `overlap_previous` starts fetching pages while the previous kernel of the stream still runs (programmatic dependent
    launch); the pages' newest tokens, q and the results wait for it. It asks that the previous kernel wrote to no page
    but at the tokens of each sequence's own queries, and to neither page_table nor the schedule.

    Nothing is read back from the device, so page_table's entries are not checked here: `AttentionPlan` does that.
    """
    check_options(schedule.window, soft_cap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    overlap = EARLY if overlap_previous else ALONE
    if not schedule.parts:
        launch_decode(q, cache, layer, page_table, schedule, out, lse, overlap=overlap, soft_cap=soft_cap)
        return out
    launch_decode(q, cache, layer, page_table, schedule, None, None, overlap=overlap, soft_cap=soft_cap)
    merge_parts(schedule, out, lse, soft_cap=soft_cap)
    return out


def launch_decode(
    q: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    schedule: DecodeSchedule,
    out: Tensor | None,
    lse: Tensor | None,
    *,
    overlap: int = ALONE,
    soft_cap: float = 0.0,
) -> None:
    """The kernel of `decode_pages`; `out` is of any type. With a schedule of parts it needs none: they stay there."""
    check_decode(q, cache, layer, page_table, schedule, lse)
    arguments, constants = decode_arguments(q, cache, layer, page_table, schedule, out, lse, overlap, soft_cap)
    decode_kernel[(schedule.programs,)](*arguments, **constants)


def check_decode(
    q: Tensor, cache: Tensor, layer: int, page_table: Tensor, schedule: DecodeSchedule, lse: Tensor | None
) -> None:
    """Raises ValueError naming the argument that `decode_pages` cannot take."""
    seqs, heads, kv_heads, d = schedule.shape
    check_pool(q, cache, layer)
    tokens = seqs * schedule.queries
    if not schedule.causal:  # q may end within the last tile
        tokens = min(tokens, q.shape[0])
    if tuple(q.shape) != (tokens, heads, d) or cache.shape[3] != kv_heads:
        raise ValueError(f"q {list(q.shape)} over {cache.shape[3]} KV heads: the schedule is for {schedule.shape}")
    if reason := why_not(d, cache.shape[4], schedule.queries * heads // kv_heads, q.dtype):
        raise ValueError(f"cache: {reason}")
    if page_table.dtype != torch.int32 or page_table.ndim != 2 or page_table.shape[0] != seqs:
        raise ValueError(f"page_table must be int32 [{seqs}, pages], not {page_table.dtype} {list(page_table.shape)}")
    if page_table.stride(1) != 1 or page_table.device != q.device:
        raise ValueError("page_table must have contiguous rows on q's device")
    check_lse(lse, q)


def decode_arguments(
    q: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    schedule: DecodeSchedule,
    out: Tensor | None,
    lse: Tensor | None,
    overlap: int,
    soft_cap: float = 0.0,
) -> tuple[tuple[object, ...], dict[str, object]]:
    """What `decode_kernel` is launched with; also what it is compiled with where there is no GPU."""
    _, layers, _, kv_heads, page_size, d = cache.shape
    group = q.shape[1] // kv_heads
    rows = kv_heads * page_size  # of a layer's K, and of its V
    box = min(page_size, UNIT)
    pool = TensorDescriptor(cache, [cache.numel() // d, d], [d, 1], [box, 64], SWIZZLE)
    arguments = (
        q, pool, out, lse, page_table,
        schedule.context_lens, schedule.skip, schedule.plan, schedule.part, schedule.stat, schedule.count,
        # Capped scores are soft_cap * tanh(s), which the kernel makes of exponentials to base 2.
        (soft_cap or d**-0.5) * LOG2_E, 2 * LOG2_E * d**-0.5 / soft_cap if soft_cap else 1.0,
        q.stride(0), page_table.stride(0), layer * 2 * rows, layers * 2 * rows, q.shape[0], schedule.shape[0],
    )  # fmt: skip
    stages = (3 if schedule.programs_each == 1 else 2) * 128 // d
    constants: dict[str, object] = {
        "KV_HEADS": kv_heads, "GROUP": group, "ROWS": next_power_of_2(group * schedule.queries), "HD": d,
        "PAGE": page_size, "BOX": box, "ST": stages, "QUERIES": schedule.queries,
        "CAUSAL": schedule.causal, "WINDOW": schedule.window, "SKIPS": schedule.skip is not None,
        "PARTS": schedule.parts, "SPLIT": SPLIT, "CAPPED": soft_cap > 0, "WITH_LSE": lse is not None,
        "OVERLAP": int(overlap), "num_warps": 4, "maxnreg": schedule.registers,
        "launch_pdl": overlap in (EARLY, BESIDE),
    }  # fmt: skip
    return arguments, constants

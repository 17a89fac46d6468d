"""Paged flash decoding for Hopper: what `decode_attention` runs there for the shapes it takes, and CUDA graphs use."""

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention_plan import AttentionPlan
from kernels.hopper_decode_kernel import decode_kernel, plan_kernel
from kernels.hopper_pool import SWIZZLE, check_pool, multiprocessors
from kernels.triton_kernel import next_power_of_2

UNIT = 64  # tokens
# From so many sequences on, two programs share a multiprocessor, with two units of 32 KiB in flight each (not three):
# on an H200 0 to 2% faster from 8 x 1,024 tokens on; one sequence is up to 18% slower that way, its heads cut finer.
MANY = 8
LOG2_E = 1.4426950408889634


class DecodeSchedule:
    """Who computes what in one step, and room for partial results; all layers of the step share it.

    `refresh` works it out anew from context_lens [seqs] int32 on the device: capture it once at the head of a graph and
    a replay follows whatever lengths the tensor then holds. A length of 0 marks a row without a sequence.
    """

    def __init__(self, context_lens: Tensor, heads: int, kv_heads: int, head_dim: int) -> None:
        if context_lens.ndim != 1 or context_lens.dtype != torch.int32 or not context_lens.is_contiguous():
            raise ValueError("context_lens must be contiguous int32 of 1 dimension")
        if heads % kv_heads:
            raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}")
        device, seqs = context_lens.device, context_lens.shape[0]
        processors = multiprocessors(device)
        self.context_lens = context_lens
        self.shape = (seqs, heads, kv_heads, head_dim)
        self.programs_each = 2 if seqs >= MANY else 1  # on a multiprocessor
        self.programs = processors * self.programs_each
        rows = next_power_of_2(heads // kv_heads)
        self.plan = torch.zeros(8 + 8 * (self.programs + 32), dtype=torch.int32, device=device)
        self.part = torch.empty(2 * self.programs * rows * head_dim, dtype=torch.float32, device=device)
        self.stat = torch.empty(2 * self.programs * 2 * rows, dtype=torch.float32, device=device)
        self.count = torch.zeros(seqs * kv_heads, dtype=torch.int32, device=device)
        if context_lens.is_cuda:
            self.refresh()

    def refresh(self) -> None:
        """Share the work out by the lengths that the device holds now."""
        seqs, _, kv_heads, _ = self.shape
        width = max(16, next_power_of_2(seqs))
        plan_kernel[(-(-self.programs // 32),)](
            self.context_lens, self.plan, seqs, self.programs, KV_HEADS=kv_heads, SEQS=width
        )


def why_not(head_dim: int, page_size: int, group: int, dtype: torch.dtype) -> str:
    """Why this shape needs the plain kernel; empty where this one takes it."""
    if head_dim not in (64, 128):
        return f"head_dim {head_dim} is neither 64 nor 128"
    if page_size not in (16, 64, 128):
        return f"page_size {page_size} is not 16, 64 or 128"
    if group > 64:
        return f"{group} query heads share a KV head, 64 at most fit a tile"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is not a 16-bit type"
    return ""


def decode_attention_hopper(
    q: Tensor, cache: Tensor, layer: int, plan: AttentionPlan, lse: Tensor | None = None
) -> Tensor:
    """As `decode_attention_triton`, for the shapes that `why_not` names nothing against."""
    seqs = plan.num_decodes
    shape = (q.shape[1], cache.shape[3], q.shape[2])
    schedule = plan.once(("hopper decode", *shape), lambda: _schedule(plan, *shape))
    return decode_pages(q, cache, layer, plan.page_table[:seqs], schedule, lse)


def _schedule(plan: AttentionPlan, heads: int, kv_heads: int, head_dim: int) -> DecodeSchedule:
    contexts = plan.contexts[: plan.num_decodes]
    schedule = DecodeSchedule(plan.context_lens[: len(contexts)], heads, kv_heads, head_dim)
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
) -> Tensor:
    """One query a sequence, q [seqs, heads, d] -> [seqs, heads, d]; lengths are those of the schedule's last refresh.

    `overlap_previous` starts fetching pages while the previous kernel of the stream still runs (programmatic dependent
    launch); the pages' last 64 tokens, q and the results wait for it. It asks that the previous kernel wrote to no page
    but at each sequence's newest token, and to neither page_table nor the schedule.

    Nothing is read back from the device, so page_table's entries are not checked here: `AttentionPlan` does that.
    """
    check_decode(q, cache, layer, page_table, schedule, lse)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arguments, constants = decode_arguments(q, cache, layer, page_table, schedule, out, lse, overlap_previous)
    decode_kernel[(schedule.programs,)](*arguments, **constants)
    return out


def check_decode(
    q: Tensor, cache: Tensor, layer: int, page_table: Tensor, schedule: DecodeSchedule, lse: Tensor | None
) -> None:
    """Raises ValueError naming the argument that `decode_pages` cannot take."""
    seqs, heads, kv_heads, d = schedule.shape
    check_pool(q, cache, layer)
    if tuple(q.shape) != (seqs, heads, d) or cache.shape[3] != kv_heads:
        raise ValueError(f"q {list(q.shape)} over {cache.shape[3]} KV heads: the schedule is for {schedule.shape}")
    if reason := why_not(d, cache.shape[4], heads // kv_heads, q.dtype):
        raise ValueError(f"cache: {reason}")
    if page_table.dtype != torch.int32 or page_table.ndim != 2 or page_table.shape[0] != seqs:
        raise ValueError(f"page_table must be int32 [{seqs}, pages], not {page_table.dtype} {list(page_table.shape)}")
    if page_table.stride(1) != 1 or page_table.device != q.device:
        raise ValueError("page_table must have contiguous rows on q's device")
    if lse is not None and (lse.shape != q.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise ValueError(f"lse must be contiguous float32 {list(q.shape[:2])}")


def decode_arguments(
    q: Tensor,
    cache: Tensor,
    layer: int,
    page_table: Tensor,
    schedule: DecodeSchedule,
    out: Tensor,
    lse: Tensor | None,
    overlap_previous: bool,
) -> tuple[tuple[object, ...], dict[str, object]]:
    """What `decode_kernel` is launched with; also what it is compiled with where there is no GPU."""
    _, layers, _, kv_heads, page_size, d = cache.shape
    group = q.shape[1] // kv_heads
    rows = kv_heads * page_size  # of a layer's K, and of its V
    box = min(page_size, UNIT)
    pool = TensorDescriptor(cache, [cache.numel() // d, d], [d, 1], [box, 64], SWIZZLE)
    arguments = (
        q, pool, out, lse, page_table,
        schedule.context_lens, schedule.plan, schedule.part, schedule.stat, schedule.count,
        d**-0.5 * LOG2_E, q.stride(0), page_table.stride(0), layer * 2 * rows, layers * 2 * rows, q.shape[0],
    )  # fmt: skip
    one = schedule.programs_each == 1
    constants: dict[str, object] = {
        "KV_HEADS": kv_heads, "GROUP": group, "ROWS": next_power_of_2(group), "HD": d, "PAGE": page_size, "BOX": box,
        "ST": (3 if one else 2) * 128 // d, "WITH_LSE": lse is not None, "OVERLAP": overlap_previous,
        "num_warps": 4, "maxnreg": 168 if one else 128, "launch_pdl": overlap_previous,
    }  # fmt: skip
    return arguments, constants

# mypy: disable-error-code="untyped-decorator"
"""Joins the parts that decode attention left of each context, and where it is asked a result from elsewhere."""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from kernels.hopper_decode_schedule import SPLIT, DecodeSchedule, part_size, span
from kernels.triton_kernel import next_power_of_2

LOG2_E = 1.4426950408889634
ROWS_AT_ONCE = 8  # of a tile, by one program: a warp by itself, so that nothing waits at a barrier


def merge_parts(
    schedule: DecodeSchedule,
    out: Tensor,
    lse: Tensor | None,
    rest: Tensor | None = None,
    rest_lse: Tensor | None = None,
    *,
    soft_cap: float = 0.0,
) -> None:
    """out [tokens, heads, d] and lse [tokens, heads] of what `launch_decode` left in a schedule of parts.

    rest [tokens, heads, d] float32 and rest_lse [tokens, heads] are the same queries' attention to other keys.
    """
    arguments, constants = merge_arguments(schedule, out, lse, rest, rest_lse, soft_cap=soft_cap)
    seqs, heads, kv_heads, _ = schedule.shape
    rows = schedule.queries * heads // kv_heads
    merge_parts_kernel[(seqs, kv_heads, -(-rows // ROWS_AT_ONCE))](*arguments, **constants)


def merge_arguments(
    schedule: DecodeSchedule,
    out: Tensor,
    lse: Tensor | None,
    rest: Tensor | None = None,
    rest_lse: Tensor | None = None,
    *,
    soft_cap: float = 0.0,
) -> tuple[tuple[object, ...], dict[str, object]]:
    """What `merge_parts_kernel` is launched with; also what it is compiled with where there is no GPU."""
    _, heads, kv_heads, d = schedule.shape
    group = heads // kv_heads
    arguments = (
        schedule.part, schedule.stat, schedule.context_lens, out, lse, rest, rest_lse,
        (soft_cap or d**-0.5) * LOG2_E, out.shape[0],
    )  # fmt: skip
    constants: dict[str, object] = {
        "KV_HEADS": kv_heads, "GROUP": group, "ROWS": next_power_of_2(schedule.queries * group), "HD": d,
        "QUERIES": schedule.queries, "WINDOW": schedule.window, "PARTS": schedule.parts, "SPLIT": SPLIT,
        "WITH_LSE": lse is not None, "WITH_REST": rest is not None, "BLOCK": ROWS_AT_ONCE, "num_warps": 1,
    }  # fmt: skip
    return arguments, constants


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def merge_parts_kernel(
    Part, Stat, Lens, Out, Lse, Rest, RestLse, scale, tokens, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, HD: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr,
    SPLIT: tl.constexpr, WITH_LSE: tl.constexpr, WITH_REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for BLOCK rows of a tile, which are query heads of one KV head as in `decode_kernel`."""
    AT_ONCE: tl.constexpr = 4  # parts; not the batch's matter, or results would differ by it
    b = tl.program_id(0)
    h = tl.program_id(1)
    _, n = span(tl.load(Lens + b), 0, QUERIES, WINDOW, False)
    parts = tl.cdiv(n, part_size(n, PARTS, SPLIT))
    row = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    token = b * QUERIES + row // GROUP
    at = token * (KV_HEADS * GROUP) + h * GROUP + row % GROUP
    inside = (row < QUERIES * GROUP) & (token < tokens)
    d = tl.arange(0, HD)[None, :]
    top = tl.full([BLOCK], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, HD], tl.float32)
    if WITH_REST:
        rest_lse = tl.load(RestLse + at, mask=inside, other=float("-inf"))
        # Loaded without knowing whether there is any: the one does not wait for the other.
        rest = tl.load(Rest + at[:, None] * HD + d, mask=inside[:, None], other=0.0)
        some = rest_lse > float("-inf")
        top = tl.where(some, rest_lse * 1.4426950408889634, top)
        total = tl.where(some, 1.0, 0.0)
        acc = tl.where(some[:, None], rest, 0.0)
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        slot = (b * KV_HEADS + h) * PARTS + part
        ok = (part < parts)[:, None] & inside[None, :]
        stat = slot[:, None] * (2 * ROWS) + row[None, :]
        place = (slot[:, None] * ROWS + row[None, :])[:, :, None] * HD + d[None, :, :]
        value = tl.load(Part + place, mask=ok[:, :, None], other=0.0)
        m = tl.load(Stat + stat, mask=ok, other=-1.0e30)  # [AT_ONCE, BLOCK]
        weight_of = tl.load(Stat + stat + ROWS, mask=ok, other=0.0)
        m = tl.where(weight_of > 0, m * scale, -1.0e30)
        new = tl.maximum(top, tl.max(m, 0))
        old = tl.exp2(top - new)
        weight = tl.exp2(m - new[None, :])
        total = total * old + tl.sum(weight_of * weight, 0)
        acc = acc * old[:, None] + tl.sum(value * weight[:, :, None], 0)
        top = new
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out = acc / total[:, None]
    tl.store(Out + at[:, None] * HD + d, out.to(Out.dtype.element_ty), mask=inside[:, None])
    if WITH_LSE:
        lse = tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        tl.store(Lse + at, lse, mask=inside)

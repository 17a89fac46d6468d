# mypy: disable-error-code="untyped-decorator"
"""How one step's decode attention is shared out over the multiprocessors, worked out on the device."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_options import check_options
from kernels.hopper_pool import multiprocessors
from kernels.triton_kernel import next_power_of_2

UNIT = 64  # tokens
TILE = 64  # rows: the query heads of one KV head, for each of a sequence's queries
# From so many sequences on, two programs share a multiprocessor, with two units of 32 KiB in flight each (not three):
# on an H200 0 to 2% faster from 8 x 1,024 tokens on; one sequence is up to 18% slower that way, its heads cut finer.
MANY = 8
# Where contexts are cut by their own length: parts of SPLIT units, or as much longer as it takes for all heads to have
# no more than PARTS, about a Hopper's multiprocessors.
SPLIT = 8
PARTS = 128


class DecodeSchedule:
    """Who computes what in one step, and room for partial results; all layers of one window share it.

    context_lens [seqs] int32, on the device: tokens of a sequence, its queries included; 0: a row without a sequence.
    queries: of each sequence, the tail of its context; times the heads that share a KV head 64 at most.
    window: each query sees so many of the newest keys up to and including its own; 0: all.
        Whole units of 64 tokens are fetched: the pages of a seen token's unit must still be the sequence's.
    batch_invariant: a sequence's results are bitwise the same in any batch: it is cut into parts by its own length, not
        by what else there is to do, and a kernel of its own joins them. They take up to 128 results' room a sequence.
    causal: False is for a prefix that many queries see whole, as `CascadeSchedule` uses it: its parts are not joined.
    skip [1] int32, on the device: so many leading tokens are left to another pass; a context up to there is empty.

    `refresh` works it out anew from the tensors: capture it once at the head of a graph and a replay follows whatever
    they then hold. Raises ValueError naming the argument that is wrong.
    """

    def __init__(
        self,
        context_lens: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        queries: int = 1,
        window: int = 0,
        batch_invariant: bool = False,
        causal: bool = True,
        skip: Tensor | None = None,
    ) -> None:
        _check_lengths("context_lens", context_lens)
        if skip is not None:
            _check_lengths("skip", skip)
            if skip.shape[0] != 1:
                raise ValueError(f"skip must have one element, not {skip.shape[0]}")
        if heads % kv_heads:
            raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}")
        if not 1 <= queries * heads // kv_heads <= TILE:
            raise ValueError(f"queries: {queries} of {heads // kv_heads} heads a KV head are not 1 to {TILE} rows")
        check_options(window, 0.0)
        device, seqs = context_lens.device, context_lens.shape[0]
        self.context_lens, self.skip = context_lens, skip
        self.shape = (seqs, heads, kv_heads, head_dim)
        self.queries, self.window, self.causal = queries, window, causal
        self.parts = 0  # of a KV head of a sequence, at most; 0: as the programs' runs fall
        if batch_invariant or not causal:
            self.parts = max(1, PARTS // (kv_heads if causal else kv_heads * seqs))
        # One compiled kernel for batches of all sizes, where their results must be the same.
        two = seqs >= MANY and queries == 1 and self.parts == 0 and skip is None
        self.programs_each = 2 if two else 1  # on a multiprocessor
        self.programs = multiprocessors(device) * self.programs_each
        # Of a thread; 128 where two programs share a multiprocessor: a prefix's pass and that of what follows it do.
        self.registers = 128 if two or not causal or (skip is not None and queries == 1) else 168
        slots = seqs * kv_heads * self.parts or 2 * self.programs
        rows = next_power_of_2(queries * heads // kv_heads)
        self.plan = torch.zeros(8 + 8 * (self.programs + 32), dtype=torch.int32, device=device)
        self.part = torch.empty(slots * rows * head_dim, dtype=torch.float32, device=device)
        self.stat = torch.empty(slots * 2 * rows, dtype=torch.float32, device=device)
        self.count = torch.zeros(seqs * kv_heads, dtype=torch.int32, device=device)
        if context_lens.is_cuda:
            self.refresh()

    def refresh(self) -> None:
        """Share the work out by the lengths that the device holds now."""
        arguments, constants = plan_arguments(self)
        plan_kernel[(-(-self.programs // 32),)](*arguments, **constants)


def _check_lengths(name: str, lens: Tensor) -> None:
    if lens.ndim != 1 or lens.dtype != torch.int32 or not lens.is_contiguous():
        raise ValueError(f"{name} must be contiguous int32 of 1 dimension")


def plan_arguments(schedule: DecodeSchedule) -> tuple[tuple[object, ...], dict[str, object]]:
    """What `plan_kernel` is launched with; also what it is compiled with where there is no GPU."""
    seqs, _, kv_heads, _ = schedule.shape
    arguments = (schedule.context_lens, schedule.skip, schedule.plan, seqs, schedule.programs)
    constants: dict[str, object] = {
        "KV_HEADS": kv_heads, "SEQS": max(16, next_power_of_2(seqs)), "QUERIES": schedule.queries,
        "WINDOW": schedule.window, "SKIPS": schedule.skip is not None, "PARTS": schedule.parts, "SPLIT": SPLIT,
    }  # fmt: skip
    return arguments, constants


@triton.jit
@no_type_check
def span(length, skip, QUERIES: tl.constexpr, WINDOW: tl.constexpr, SKIPS: tl.constexpr):
    """The units that a sequence's queries look at: the first, and how many."""
    base = length * 0
    end = (length + 63) // 64
    if WINDOW > 0:
        base = tl.maximum(length - (QUERIES + WINDOW - 1), 0) // 64
    if SKIPS:
        base = skip // 64
        end = tl.where(length > skip, end, base)
    return base, end - base


@triton.jit
@no_type_check
def part_size(units, PARTS: tl.constexpr, SPLIT: tl.constexpr):
    """Units of each part but the last of a head that looks at so many, by nothing but that number."""
    return tl.maximum((units + PARTS - 1) // PARTS, SPLIT)


@triton.jit
@no_type_check
def _before(values, seq, b):
    """The sum of `values` [SEQS] over the sequences before each of b [32]."""
    return tl.sum(tl.where(seq[None, :] < b[:, None], values[None, :], 0), 1)


@triton.jit(do_not_specialize=["seqs", "programs"])
@no_type_check
def plan_kernel(
    Lens, Skip, Plan, seqs, programs, KV_HEADS: tl.constexpr, SEQS: tl.constexpr, QUERIES: tl.constexpr,
    WINDOW: tl.constexpr, SKIPS: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Each program's run of (sequence, head, unit), 32 programs a block.

    What is shared out equally are units, or with PARTS whole parts of contexts.
    Plan: pieces, programs used, then 8 ints a program: sequence, head, first unit, units to do, units of the sequence,
    its length, the number of its head's first unit, the unit of the context that its units are counted from.
    """
    seq = tl.arange(0, SEQS)
    lens = tl.load(Lens + seq, mask=seq < seqs, other=0)
    skip = tl.load(Skip) if SKIPS else 0
    _, units_of = span(lens, skip, QUERIES, WINDOW, SKIPS)
    pieces_of = units_of * KV_HEADS
    if PARTS > 0:
        pieces_of = tl.cdiv(units_of, part_size(units_of, PARTS, SPLIT)) * KV_HEADS
    ends = tl.cumsum(pieces_of, 0)
    pieces = tl.sum(pieces_of, 0)
    used = tl.maximum(tl.minimum(programs, pieces), 1)
    c = tl.program_id(0) * 32 + tl.arange(0, 32)
    start = c * pieces // used
    stop = (c + 1) * pieces // used
    b = tl.sum(((ends[None, :] <= start[:, None]) & (seq[None, :] < seqs)).to(tl.int32), 1)
    ok = (c < used) & (b < seqs)
    offset = start - _before(pieces_of, seq, b)
    length = tl.load(Lens + b, mask=ok, other=1)
    base, n = span(length, skip, QUERIES, WINDOW, SKIPS)
    n = tl.maximum(n, 1)  # of a program without work
    todo = stop - start
    if PARTS > 0:
        size = part_size(n, PARTS, SPLIT)
        parts = tl.cdiv(n, size)
        offset = offset // parts * n + offset % parts * size
        last = tl.sum(((ends[None, :] <= stop[:, None]) & (seq[None, :] < seqs)).to(tl.int32), 1)
        n_last = tl.maximum(_before(units_of, seq, last + 1) - _before(units_of, seq, last), 1)
        size_last = part_size(n_last, PARTS, SPLIT)
        parts_last = tl.cdiv(n_last, size_last)
        over = stop - _before(pieces_of, seq, last)
        over = over // parts_last * n_last + over % parts_last * size_last
        todo = (_before(units_of, seq, last) - _before(units_of, seq, b)) * KV_HEADS + over - offset
    record = Plan + 8 + c * 8
    tl.store(record, b)
    tl.store(record + 1, offset // n)
    tl.store(record + 2, offset % n)
    tl.store(record + 3, tl.where(ok, todo, 0))
    tl.store(record + 4, n)
    tl.store(record + 5, length)
    tl.store(record + 6, start - offset % n)
    tl.store(record + 7, base)
    tl.store(Plan, pieces)
    tl.store(Plan + 1, used)

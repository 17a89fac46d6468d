# mypy: disable-error-code="untyped-decorator"
"""The last kernel of `sample`: one program a row finds where its kept tokens end, and draws one of them."""

from typing import no_type_check

import triton
import triton.language as tl

from kernels.sample_steps import (
    ID_BITS,
    ID_MASK,
    LIST,
    MAX_COUNT,
    NOTHING,
    STATE,
    cuts,
    draws,
    least_weight,
    rank,
    share,
    steps_and_ids,
    uniform,
    weigh,
)


@triton.jit(do_not_specialize=["chunks"])
@no_type_check
def draw_kernel(
    logits_ptr,
    edited_ptr,
    is_edited_ptr,
    peaks_ptr,
    tops_ptr,
    state_ptr,
    masses_ptr,
    list_ptr,
    listed_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    counts_ptr,
    ids_ptr,
    vocab,
    chunks,
    logits_stride,
    DRAWS: tl.constexpr,
    EDITS: tl.constexpr,
    WITH_COUNTS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS_BLOCK)
    peaks = tl.load(peaks_ptr + row * chunks + c, mask=c < chunks, other=float("-inf"))
    peak = tl.max(peaks)
    tops = tl.load(tops_ptr + row * chunks + c, mask=c < chunks, other=vocab)
    token = tl.min(tl.where(peaks == peak, tops, vocab))
    if DRAWS:
        temperature = tl.load(temperature_ptr + row)
        if draws(temperature, peak):
            top_p = tl.load(top_p_ptr + row)
            least = least_weight(tl.load(min_p_ptr + row))
            source = (logits_ptr, edited_ptr, is_edited_ptr, vocab, chunks, logits_stride)
            limit = tl.full([], NOTHING, tl.int64)
            if cuts(tl.load(top_k_ptr + row), top_p, vocab):
                candidates = (state_ptr, list_ptr, listed_ptr)
                limit = _limit(source, candidates, masses_ptr, row, peak, temperature, top_p, least, EDITS, CHUNK)
            # Past the first-level cache, which may hold the masses from before the candidates' were added.
            masses = tl.load(masses_ptr + row * chunks + c, mask=c < chunks, other=0, cache_modifier=".cg")
            total = tl.sum(masses)
            number = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
            # Rounding must not lift the target to the total.
            target = tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)
            chunk = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32))
            target -= tl.sum(tl.where(c < chunk, masses, 0))
            steps, ids = steps_and_ids(source, row, chunk, peak, temperature, EDITS, CHUNK)
            weight = weigh(steps)
            weight = tl.where((rank(steps, ids) <= limit) & (weight >= least), weight, 0)
            token = chunk * CHUNK + tl.sum((tl.cumsum(weight, 0) <= target).to(tl.int32))
    tl.store(ids_ptr + row, token.to(tl.int64))
    if WITH_COUNTS:
        packed = tl.load(counts_ptr + row * vocab + token)
        full = (packed & MAX_COUNT) == MAX_COUNT
        tl.store(counts_ptr + row * vocab + token, tl.where(full, packed, packed + 1))


@triton.jit
@no_type_check
def _limit(
    source, candidates, masses_ptr, row, peak, temperature, top_p, least, EDITS: tl.constexpr, CHUNK: tl.constexpr
):
    """The rank of the last token that top-k and top-p keep. Adds the kept candidates to the masses of their chunks."""
    state_ptr, list_ptr, listed_ptr = candidates
    first = tl.load(state_ptr + row * STATE)
    limit = (tl.load(state_ptr + row * STATE + 1) << ID_BITS) - 1
    wanted = tl.load(state_ptr + row * STATE + 2)
    mass_before = tl.load(state_ptr + row * STATE + 3)
    total = tl.load(state_ptr + row * STATE + 4)
    listed = tl.load(listed_ptr + row)
    # Where there are more candidates than fit the list (equals, by the thousand), every question reads the row anew.
    chunks = tl.where(listed > LIST, source[4], 0)
    i = tl.arange(0, LIST)
    inside = (i < listed) & (chunks == 0)
    ranks = tl.load(list_ptr + row * LIST + i, mask=inside, other=NOTHING)
    weights = tl.where(inside, weigh((ranks >> ID_BITS).to(tl.int32)), 0)
    where = (ranks, weights, first, chunks, row, peak, temperature)
    if wanted > 0:
        limit = _end(source, where, first << ID_BITS, limit, wanted, False, EDITS, CHUNK)
        if top_p < 1.0:
            mass, _, _ = _reach(source, where, limit, True, EDITS, CHUNK)
            total = mass_before + mass
    if top_p < 1.0:
        wanted = share(top_p, total) - mass_before
        limit = _end(source, where, first << ID_BITS, limit, wanted, True, EDITS, CHUNK)
    kept = (ranks <= limit) & (weights >= least)
    token = (ranks & ID_MASK).to(tl.int32)
    tl.atomic_add(masses_ptr + row * source[4] + token // CHUNK, weights, mask=kept, sem="relaxed")
    for chunk in range(chunks):
        steps, ids = steps_and_ids(source, row, chunk, peak, temperature, EDITS, CHUNK)
        weight = weigh(steps)
        kept = (steps >= first) & (rank(steps, ids) <= limit) & (weight >= least)
        tl.atomic_add(masses_ptr + row * source[4] + chunk, tl.sum(tl.where(kept, weight, 0)), sem="relaxed")
    tl.debug_barrier()
    return limit


@triton.jit
@no_type_check
def _end(source, where, low, high, wanted, BY_MASS: tl.constexpr, EDITS: tl.constexpr, CHUNK: tl.constexpr):
    """The least rank up to which the candidates reach `wanted`: interpolation and bisection in turns.

    Each turn moves an end to the next candidate, so that ranks without one cost no turns.
    """
    below_low = tl.zeros([], tl.int64)
    below_high, high, _ = _reach(source, where, high, BY_MASS, EDITS, CHUNK)
    turn = 0
    while low < high:
        part = (wanted - below_low).to(tl.float32) / (below_high - below_low).to(tl.float32)
        part = tl.where(turn == 1, 0.5, part)  # a guess: any rank from low to high - 1 will do
        middle = tl.minimum(low + ((high - low).to(tl.float32) * part).to(tl.int64), high - 1)
        reached, below, above = _reach(source, where, middle, BY_MASS, EDITS, CHUNK)
        if reached >= wanted:
            high = below
            below_high = reached
        else:
            low = above
            below_low = reached
        turn = 1 - turn
    return low


@triton.jit
@no_type_check
def _reach(source, where, middle, BY_MASS: tl.constexpr, EDITS: tl.constexpr, CHUNK: tl.constexpr):
    """(number or mass of candidates up to `middle`, the last of these, the first after them)."""
    ranks, weights, first, chunks, row, peak, temperature = where
    amount = weights if BY_MASS else (weights > 0).to(tl.int64)
    reached = tl.sum(tl.where(ranks <= middle, amount, 0))
    below = tl.max(tl.where(ranks <= middle, ranks, 0))
    above = tl.min(tl.where(ranks > middle, ranks, NOTHING))
    for chunk in range(chunks):
        steps, ids = steps_and_ids(source, row, chunk, peak, temperature, EDITS, CHUNK)
        weight = weigh(steps)
        order = tl.where((steps >= first) & (weight > 0), rank(steps, ids), NOTHING)
        amount = weight if BY_MASS else (weight > 0).to(tl.int64)
        reached += tl.sum(tl.where(order <= middle, amount, 0))
        below = tl.maximum(below, tl.max(tl.where(order <= middle, order, 0)))
        above = tl.minimum(above, tl.min(tl.where(order > middle, order, NOTHING)))
    return reached, below, above

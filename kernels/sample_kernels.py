# mypy: disable-error-code="untyped-decorator"
"""The kernels of `sample` that read whole rows, in the order in which they run; `sample_draw_kernel` ends it."""

from typing import no_type_check

import triton
import triton.language as tl

from kernels.sample_steps import (
    BIN_BITS,
    BINS,
    LIST,
    MAX_COUNT,
    STATE,
    STEP_BITS,
    cuts,
    digits,
    draws,
    finite,
    least_weight,
    octaves_per_logit,
    rank,
    row_peak,
    share,
    steps_and_ids,
    to_steps,
    weigh,
    zeros,
)


@triton.jit(do_not_specialize=["chunks", "biases"])
@no_type_check
def edit_kernel(
    logits_ptr,
    edited_ptr,
    is_edited_ptr,
    peaks_ptr,
    tops_ptr,
    sums_ptr,
    histogram_ptr,
    rest_ptr,
    listed_ptr,
    temperature_ptr,
    top_p_ptr,
    counts_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    positions_ptr,
    bias_ids_ptr,
    bias_ptr,
    bias_until_ptr,
    vocab,
    chunks,
    biases,
    logits_stride,
    BIAS_BLOCK: tl.constexpr,
    WITH_COUNTS: tl.constexpr,
    COPIES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Bias and penalties; then a chunk's largest logit, the lowest token that has it, and about what mass it makes."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    x = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    edited = 0
    if BIAS_BLOCK > 0:
        entry = tl.arange(0, BIAS_BLOCK)
        ids = tl.load(bias_ids_ptr + row * biases + entry, mask=entry < biases, other=-1)
        until = tl.load(bias_until_ptr + row * biases + entry, mask=entry < biases, other=0)
        here = (ids >= chunk * CHUNK) & (ids < (chunk + 1) * CHUNK)
        left = tl.where(here & (tl.load(positions_ptr + row) < until), entry, BIAS_BLOCK)
        next_entry = tl.min(left)
        while next_entry < BIAS_BLOCK:
            edited = 1
            added = tl.load(bias_ptr + row * biases + next_entry)
            x = tl.where(token == tl.load(bias_ids_ptr + row * biases + next_entry), x + added, x)
            left = tl.where(left == next_entry, BIAS_BLOCK, left)
            next_entry = tl.min(left)
    if WITH_COUNTS:
        repetition = tl.load(repetition_ptr + row)
        frequency = tl.load(frequency_ptr + row)
        presence = tl.load(presence_ptr + row)
        if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
            edited = 1
            packed = tl.load(counts_ptr + row * vocab + token, mask=inside, other=0).to(tl.int32)
            scaled = tl.where(x > 0.0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
            x = tl.where(packed != 0, scaled, x)
            count = packed & MAX_COUNT
            x = tl.where(count > 0, x - (frequency * count.to(tl.float32) + presence), x)
    x = finite(x)
    if edited != 0:
        tl.store(edited_ptr + row * vocab + token, x, mask=inside)
    peak = tl.max(x)
    tl.store(is_edited_ptr + row * chunks + chunk, edited)
    tl.store(peaks_ptr + row * chunks + chunk, peak)
    tl.store(tops_ptr + row * chunks + chunk, tl.min(tl.where(x == peak, token, vocab)))
    temperature = tl.load(temperature_ptr + row)
    if draws(temperature, peak) & (tl.load(top_p_ptr + row) < 1.0):
        below = (peak - x) * octaves_per_logit(temperature)
        tl.store(sums_ptr + row * chunks + chunk, tl.sum(tl.exp2(-below)))
    if chunk < COPIES:
        bins = (row * COPIES + chunk) * BINS + tl.arange(0, BINS)
        tl.store(histogram_ptr + bins, tl.zeros([BINS], tl.int64))
    if chunk == 0:
        tl.store(rest_ptr + row, tl.zeros([], tl.int64))
        tl.store(listed_ptr + row, 0)


@triton.jit(do_not_specialize=["chunks"])
@no_type_check
def histogram_kernel(
    logits_ptr,
    edited_ptr,
    is_edited_ptr,
    peaks_ptr,
    sums_ptr,
    histogram_ptr,
    rest_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    vocab,
    chunks,
    logits_stride,
    EDITS: tl.constexpr,
    COPIES: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """How many tokens lie in each bin of 1/32 octave, and their mass: both in one word, mass << 19 | count.

    Tokens that cannot be kept are left out, but for their mass, which top-p counts too.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    c = tl.arange(0, CHUNKS_BLOCK)
    peaks = tl.load(peaks_ptr + row * chunks + c, mask=c < chunks, other=float("-inf"))
    peak = tl.max(peaks)
    if not (draws(temperature, peak) & cuts(top_k, top_p, vocab)):
        return
    source = (logits_ptr, edited_ptr, is_edited_ptr, vocab, chunks, logits_stride)
    steps, _ = steps_and_ids(source, row, chunk, peak, temperature, EDITS, CHUNK)
    octaves = (peak - peaks) * octaves_per_logit(temperature)
    last = tl.full([], 2**31 - 1, tl.int32)
    if (top_k > 0) & (top_k <= chunks):
        # So many chunks' largest tokens are as large as the top_k-th of them: tokens below it are not among top_k.
        order = tl.sum((peaks[None, :] >= peaks[:, None]).to(tl.int32), axis=1)
        last = tl.min(tl.where(order >= top_k, to_steps(octaves), last))
    elif (top_k <= 0) | (top_k >= vocab):
        # The last token of top-p and those after it make up more than 1 - top_p of the mass, and are at most vocab: its
        # weight is above their mean. A hundredth is taken off for rounding.
        sums = tl.load(sums_ptr + row * chunks + c, mask=(c < chunks) & (peaks > float("-inf")), other=0.0)
        mean = (1.0 - top_p) * tl.sum(sums * tl.exp2(-octaves)) / vocab
        last = to_steps(-tl.log2(tl.maximum(mean * 0.99, 1e-18)))
    mass = digits(steps)  # in units that all tokens of a bin share
    counted = (mass > 0) & (steps <= last)
    packed = (mass.to(tl.int64) << 19) + 1
    bins = histogram_ptr + (row * COPIES + chunk % COPIES) * BINS + (steps >> BIN_BITS)
    tl.atomic_add(bins, packed, mask=counted, sem="relaxed")
    tl.atomic_add(rest_ptr + row, tl.sum(tl.where(counted, 0, weigh(steps))), sem="relaxed")


@triton.jit(do_not_specialize=["chunks"])
@no_type_check
def cut_kernel(
    histogram_ptr,
    rest_ptr,
    peaks_ptr,
    state_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    vocab,
    chunks,
    COPIES: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
):
    """The bins in which top-k and top-p can end: their tokens are the candidates.

    Leaves in state [rows, 5] the candidates' first step and the first after them, how many of them top-k keeps (0 where
    it is off), the mass before them, and the mass of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    peak = row_peak(peaks_ptr, row, chunks, CHUNKS_BLOCK)
    if not (draws(tl.load(temperature_ptr + row), peak) & cuts(top_k, top_p, vocab)):
        return
    i = tl.arange(0, BINS)
    packed = tl.zeros([BINS], tl.int64)
    for copy in tl.static_range(COPIES):
        packed += tl.load(histogram_ptr + (row * COPIES + copy) * BINS + i)
    count = (packed & ((1 << 19) - 1)).to(tl.int32)
    mass = (packed >> 19) << zeros(i >> (STEP_BITS - BIN_BITS))
    total = tl.sum(mass) + tl.load(rest_ptr + row)
    by_count = (top_k > 0) & (top_k < vocab) & (top_k <= tl.sum(count))
    last = tl.sum((tl.cumsum(count, 0) < top_k).to(tl.int32))
    first = tl.where(by_count, last, BINS)
    if top_p < 1.0:
        # How much of its last bin top-k keeps is not known yet: the mass wanted may be reached so early.
        least = tl.where(by_count, tl.sum(tl.where(i < last, mass, 0)), total)
        first = tl.sum((tl.cumsum(mass, 0) < share(top_p, least)).to(tl.int32))
    last = tl.where(by_count, last, first)
    tl.store(state_ptr + row * STATE, first.to(tl.int64) << BIN_BITS)
    tl.store(state_ptr + row * STATE + 1, (last + 1).to(tl.int64) << BIN_BITS)
    kept = tl.where(by_count, top_k - tl.sum(tl.where(i < first, count, 0)), 0)
    tl.store(state_ptr + row * STATE + 2, kept.to(tl.int64))
    tl.store(state_ptr + row * STATE + 3, tl.sum(tl.where(i < first, mass, 0)))
    tl.store(state_ptr + row * STATE + 4, total)


@triton.jit(do_not_specialize=["chunks"])
@no_type_check
def collect_kernel(
    logits_ptr,
    edited_ptr,
    is_edited_ptr,
    peaks_ptr,
    state_ptr,
    masses_ptr,
    list_ptr,
    listed_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    vocab,
    chunks,
    logits_stride,
    EDITS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The mass of a chunk's tokens that are kept for sure, and the row's list of candidates, in no order."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    peak = row_peak(peaks_ptr, row, chunks, CHUNKS_BLOCK)
    if not draws(temperature, peak):
        return
    source = (logits_ptr, edited_ptr, is_edited_ptr, vocab, chunks, logits_stride)
    steps, token = steps_and_ids(source, row, chunk, peak, temperature, EDITS, CHUNK)
    weight = weigh(steps)
    sure = weight >= least_weight(tl.load(min_p_ptr + row))
    if cuts(tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), vocab):
        first = tl.load(state_ptr + row * STATE)
        end = tl.load(state_ptr + row * STATE + 1)
        sure = sure & (steps < first)
        candidate = (steps >= first) & (steps < end) & (weight > 0)
        found = tl.sum(candidate.to(tl.int32))
        if found > 0:
            place = tl.atomic_add(listed_ptr + row, found, sem="relaxed") + tl.cumsum(candidate.to(tl.int32), 0) - 1
            tl.store(list_ptr + row * LIST + place, rank(steps, token), mask=candidate & (place < LIST))
    tl.store(masses_ptr + row * chunks + chunk, tl.sum(tl.where(sure, weight, 0)))

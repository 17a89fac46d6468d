# mypy: disable-error-code="untyped-decorator"
"""What the kernels of `sample` share: a token's steps below its row's peak, its weight, its rank."""

from typing import no_type_check

import triton
import triton.language as tl

from kernels import sample_scale as scale

BINS, LIST, STATE = tl.constexpr(scale.BINS), tl.constexpr(scale.LIST), tl.constexpr(scale.STATE)
ID_BITS, STEP_BITS, BIN_BITS = tl.constexpr(scale.ID_BITS), tl.constexpr(scale.STEP_BITS), tl.constexpr(scale.BIN_BITS)
OCTAVES, LOG2_E, LARGEST = tl.constexpr(scale.OCTAVES), tl.constexpr(scale.LOG2_E), tl.constexpr(scale.LARGEST)
OCTAVE, ID_MASK = tl.constexpr(1 << scale.STEP_BITS), tl.constexpr((1 << scale.ID_BITS) - 1)
MANTISSA_BITS, WEIGHT_SHIFT = tl.constexpr(scale.MANTISSA_BITS), tl.constexpr(scale.WEIGHT_SHIFT)
LONGEST = tl.constexpr((1 << scale.MANTISSA_BITS) - 1)
PEAK_WEIGHT, NOTHING = tl.constexpr(scale.PEAK_WEIGHT), tl.constexpr(scale.NOTHING)
GREEDY_BELOW, MAX_COUNT = tl.constexpr(scale.GREEDY_BELOW), tl.constexpr(scale.MAX_COUNT)
C1, C2, C3, C4, C5 = (tl.constexpr(c) for c in scale.POLYNOMIAL)


@triton.jit
@no_type_check
def finite(x):
    """x without NaN and +inf: neither may pass for a token's logit."""
    return tl.minimum(tl.where(x > float("-inf"), x, float("-inf")), LARGEST)


@triton.jit
@no_type_check
def row_peak(peaks_ptr, row, chunks, CHUNKS_BLOCK: tl.constexpr):
    """The largest logit of a row."""
    c = tl.arange(0, CHUNKS_BLOCK)
    return tl.max(tl.load(peaks_ptr + row * chunks + c, mask=c < chunks, other=float("-inf")))


@triton.jit
@no_type_check
def draws(temperature, peak):
    """Whether the row is drawn, not taken at its peak: a row without any logit takes token 0."""
    return (temperature >= GREEDY_BELOW) & (peak > float("-inf"))


@triton.jit
@no_type_check
def cuts(top_k, top_p, vocab):
    """Whether the row keeps less than all tokens."""
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0)


@triton.jit
@no_type_check
def octaves_per_logit(temperature):
    """log2(e) / temperature, correctly rounded."""
    return tl.div_rn(tl.full([], LOG2_E, tl.float32), temperature)


@triton.jit
@no_type_check
def to_steps(octaves):
    """Octaves below the peak, as steps."""
    return (tl.minimum(octaves, OCTAVES) * OCTAVE).to(tl.int32)


@triton.jit
@no_type_check
def steps_and_ids(source, row, chunk, peak, temperature, EDITS: tl.constexpr, CHUNK: tl.constexpr):
    """(steps below the peak [CHUNK] int32, token ids [CHUNK] int32) of a chunk."""
    logits_ptr, edited_ptr, is_edited_ptr, vocab, chunks, logits_stride = source
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    edited = 0
    if EDITS:
        edited = tl.load(is_edited_ptr + row * chunks + chunk)
    if edited != 0:
        x = tl.load(edited_ptr + row * vocab + token, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    return to_steps((peak - finite(x)) * octaves_per_logit(temperature)), token


@triton.jit
@no_type_check
def _less(f, t, C: tl.constexpr):
    """C - f * t, for f and t in units of 2^-32 and 2^-31."""
    return tl.full(f.shape, C, tl.uint32) - tl.umulhi(f, t)


@triton.jit
@no_type_check
def digits(steps):
    """The leading bits of the weight, without the zeros that `weigh` appends for the octave."""
    f = (steps << (32 - STEP_BITS)).to(tl.uint32, bitcast=True)
    t = _less(f, _less(f, _less(f, _less(f, tl.full(f.shape, C5, tl.uint32), C4), C3), C2), C1)
    mantissa = tl.full(f.shape, LONGEST, tl.int32) - (tl.umulhi(f, t) >> (31 - MANTISSA_BITS)).to(tl.int32)
    return mantissa >> tl.minimum(tl.maximum((steps >> STEP_BITS) - WEIGHT_SHIFT, 0), 31)


@triton.jit
@no_type_check
def zeros(octave):
    """How many zero bits follow the `digits` of a weight in this octave."""
    return -tl.minimum(octave - WEIGHT_SHIFT, 0).to(tl.int64)


@triton.jit
@no_type_check
def weigh(steps):
    """steps -> weight int64: 2^40 at the peak, half of it an octave below."""
    return digits(steps).to(tl.int64) << zeros(steps >> STEP_BITS)


@triton.jit
@no_type_check
def least_weight(min_p):
    """What min-p asks of a weight."""
    return (min_p.to(tl.float64) * PEAK_WEIGHT).to(tl.int64)


@triton.jit
@no_type_check
def share(top_p, total):
    """The mass that top-p asks for."""
    return tl.maximum((top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)


@triton.jit
@no_type_check
def rank(steps, token):
    """One number for the order of tokens: the most probable first, of equals the lowest id."""
    return (steps.to(tl.int64) << ID_BITS) | token


@triton.jit
@no_type_check
def uniform(seed, position):
    """The kernel of `philox.uniform`: a float64 in [0, 1)."""
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, _, _ = tl.philox(seed, low, high, zero, zero)
    return ((a >> 5).to(tl.int64) * (1 << 26) + (b >> 6).to(tl.int64)).to(tl.float64) * (2.0**-53)

"""Choosing each row's next token on the device, without a sort and without a word from the host.

How far a token lies below its row's peak is taken as a whole number (`sample_scale`), so all sums are exact. A
histogram of these tells in which bins top-k and top-p end, a list takes the few tokens of those bins, and a bisection
over the list finds the exact end. The draw inverts the cumulative distribution in the order of ids. A row's logits are
read once (greedy), twice (temperature, min-p) or three times (top-k, top-p).
"""

import torch
from torch import Tensor

from kernels import sample_scale as scale
from kernels.philox import uniform
from kernels.sample_rows import SamplingRows
from kernels.triton_kernel import next_power_of_2


def sample(logits: Tensor, rows: SamplingRows, *, greedy: bool = False) -> Tensor:
    """logits [rows, vocab] float32 or bfloat16 -> ids [rows] int64. Adds the ids to `rows.counts`.

    A row's id depends on its own logits and settings alone, bit for bit: not on the batch, nor on the device. NaN
    counts as -inf; of a row without any other logit token 0 is taken. `greedy`: the caller knows that no row has a
    temperature, which saves the launches that would find nothing to do. Raises ValueError naming the argument that
    does not fit.
    """
    rows.check(logits)
    return sample_triton(logits, rows, greedy=greedy) if logits.is_cuda else sample_torch(logits, rows)


def sample_torch(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The twin of `sample_triton`, by sorting."""
    x = _edit(logits.float(), rows)  # [rows, vocab]
    peaks = x.max(-1, keepdim=True).values
    ids = (x == peaks).int().argmax(-1)
    drawn = ((rows.temperature >= scale.GREEDY_BELOW) & (peaks[:, 0] > -torch.inf)).nonzero()[:, 0]
    if len(drawn):
        steps = _steps(x[drawn], peaks[drawn], rows.temperature[drawn, None])
        masses = _kept(steps, rows.top_k[drawn], rows.top_p[drawn], rows.min_p[drawn]).cumsum(-1)
        numbers = uniform(rows.seeds[drawn], rows.positions[drawn])  # [drawn] float64
        totals = masses[:, -1]
        targets = torch.minimum((numbers * totals.double()).long(), totals - 1)
        ids[drawn] = torch.searchsorted(masses, targets[:, None], right=True)[:, 0]
    if rows.counts is not None:
        packed = rows.counts.gather(1, ids[:, None])
        rows.counts.scatter_(1, ids[:, None], packed + ((packed & scale.MAX_COUNT) < scale.MAX_COUNT).short())
    return ids


def _edit(x: Tensor, rows: SamplingRows) -> Tensor:
    """x [rows, vocab] float32 with bias and penalties."""
    applies = (rows.bias_ids >= 0) & (rows.positions[:, None] < rows.bias_until)
    x = x.scatter_add(1, rows.bias_ids.clamp(min=0).long(), torch.where(applies, rows.bias, 0.0))
    if rows.counts is not None:
        repetition = rows.repetition_penalty[:, None]
        x = torch.where(rows.counts != 0, torch.where(x > 0, x / repetition, x * repetition), x)
        count = rows.counts & scale.MAX_COUNT
        less = rows.frequency_penalty[:, None] * count.float() + rows.presence_penalty[:, None]
        x = torch.where(count > 0, x - less, x)
    return torch.where(x > -torch.inf, x, -torch.inf).clamp(max=scale.LARGEST)


def _steps(x: Tensor, peaks: Tensor, temperature: Tensor) -> Tensor:
    """[rows, vocab] int64: how many steps of 2^-25 octaves each probability lies below its row's peak."""
    octaves = (peaks - x) * (torch.full_like(temperature, scale.LOG2_E) / temperature)
    return octaves.clamp(max=scale.OCTAVES).mul(2**scale.STEP_BITS).long()


def weigh(steps: Tensor) -> Tensor:
    """int64 -> int64: 2^40 at the peak, half of it an octave below."""
    f = (steps << (32 - scale.STEP_BITS)) & 0xFFFFFFFF
    t = torch.zeros_like(f)
    for coefficient in reversed(scale.POLYNOMIAL):
        t = coefficient - (f * t >> 32)
    mantissa = (1 << scale.MANTISSA_BITS) - 1 - ((f * t >> 32) >> (31 - scale.MANTISSA_BITS))
    weights: Tensor = (mantissa << scale.WEIGHT_SHIFT) >> (steps >> scale.STEP_BITS)
    return weights


def _kept(steps: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The weights [rows, vocab] int64 of the tokens that top-k, top-p and min-p leave, 0 for the others."""
    weights, order = weigh(steps), steps.sort(dim=-1, stable=True).indices
    ranked = weights.gather(1, order)
    place = torch.arange(steps.shape[1], device=steps.device)
    ranked = torch.where((top_k[:, None] > 0) & (place >= top_k[:, None]), 0, ranked)
    masses = ranked.cumsum(-1)
    wanted = (top_p.double() * masses[:, -1].double()).long().clamp(min=1)
    wanted = torch.where(top_p < 1, wanted, masses[:, -1])
    ranked = torch.where(masses - ranked < wanted[:, None], ranked, 0)
    least = (min_p.double() * scale.PEAK_WEIGHT).long()
    return torch.zeros_like(weights).scatter_(1, order, torch.where(ranked >= least[:, None], ranked, 0))


def sample_triton(logits: Tensor, rows: SamplingRows, *, greedy: bool = False) -> Tensor:
    """Five launches, two where `greedy`, of programs for (row, chunk of 2,048 tokens) or for a row."""
    from kernels.sample_draw_kernel import draw_kernel
    from kernels.sample_kernels import collect_kernel, cut_kernel, edit_kernel, histogram_kernel

    count, vocab = logits.shape
    entries, edits = rows.bias_ids.shape[1], rows.bias_ids.shape[1] > 0 or rows.counts is not None
    chunks = -(-vocab // scale.CHUNK)
    room = _Room(logits, chunks, edits)
    counts = room.tops if rows.counts is None else rows.counts
    warps = {"num_warps": 8}
    blocks: dict[str, int] = {"CHUNK": scale.CHUNK, "CHUNKS_BLOCK": next_power_of_2(chunks)}
    copies = {"COPIES": room.histogram.shape[1]}
    cuts = (rows.temperature, rows.top_k, rows.top_p)
    # Fused multiply-adds would round the penalties otherwise than the CPU does.
    edit_kernel[(count, chunks)](
        logits, room.edited, room.is_edited, room.peaks, room.tops, room.sums, room.histogram, room.rest, room.listed,
        rows.temperature, rows.top_p, counts, rows.repetition_penalty, rows.frequency_penalty, rows.presence_penalty,
        rows.positions, rows.bias_ids, rows.bias, rows.bias_until, vocab, chunks, entries, logits.stride(0),
        BIAS_BLOCK=next_power_of_2(entries) if entries else 0, WITH_COUNTS=rows.counts is not None,
        CHUNK=scale.CHUNK, **copies, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    source = (logits, room.edited, room.is_edited, room.peaks)
    sizes = (vocab, chunks, logits.stride(0))
    if not greedy:
        histogram_kernel[(count, chunks)](
            *source, room.sums, room.histogram, room.rest, *cuts, *sizes, EDITS=edits, **copies, **blocks, **warps
        )
        cut_kernel[(count,)](
            room.histogram, room.rest, room.peaks, room.state, *cuts, vocab, chunks,
            **copies, CHUNKS_BLOCK=blocks["CHUNKS_BLOCK"], **warps,
        )  # fmt: skip
        collect_kernel[(count, chunks)](
            *source, room.state, room.masses, room.list, room.listed, *cuts, rows.min_p, *sizes,
            EDITS=edits, **blocks, **warps,
        )  # fmt: skip
    ids = torch.empty(count, dtype=torch.int64, device=logits.device)
    draw_kernel[(count,)](
        *source, room.tops, room.state, room.masses, room.list, room.listed, *cuts, rows.min_p, rows.seeds,
        rows.positions, counts, ids, *sizes, DRAWS=not greedy, EDITS=edits, WITH_COUNTS=rows.counts is not None,
        **blocks, num_warps=4,
    )  # fmt: skip
    return ids


def histogram_copies(rows: int, vocab: int) -> int:
    """In how many parts each row's histogram is counted; the kernels are compiled for each number."""
    return max(1, min(scale.COPIES, -(-vocab // scale.CHUNK), 32 // max(rows, 1)))


class _Room:
    """What the kernels leave for each other."""

    def __init__(self, logits: Tensor, chunks: int, edits: bool) -> None:
        rows, vocab = logits.shape

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=logits.device)

        self.edited = empty(torch.float32, vocab) if edits else logits
        self.is_edited = empty(torch.int32, chunks)
        self.peaks = empty(torch.float32, chunks)  # the largest logit of each chunk
        self.tops = empty(torch.int32, chunks)  # its token
        self.sums = empty(torch.float32, chunks)  # about its mass, its largest logit counting 1
        self.histogram = empty(torch.int64, histogram_copies(rows, vocab), scale.BINS)
        self.rest = empty(torch.int64)  # the mass that is not in the histogram
        self.state = empty(torch.int64, scale.STATE)
        self.masses = empty(torch.int64, chunks)  # the weight of what is kept of each chunk
        self.list = empty(torch.int64, scale.LIST)
        self.listed = empty(torch.int32)

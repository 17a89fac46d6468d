"""Logits and settings that try a sampler: peaked, flat, tied and masked rows, and every setting on some row."""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from engine.logit_transforms import completing
from engine.sampling_params import SamplingParams
from kernels.sample_rows import SamplingRows, count_tokens

ENTRIES = 6


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(rows: int, vocab: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=_generator(seed)) * scale


def _peaked(rows: int, vocab: int, seed: int) -> Tensor:
    logits = _normal(rows, vocab, seed)
    logits[:, vocab // 2] += 14
    logits[:, vocab // 3] += 12
    return logits


def _masked(rows: int, vocab: int, seed: int) -> Tensor:
    """-inf but for one token in 50; one row has nothing else, one has NaN and +inf."""
    logits = _normal(rows, vocab, seed)
    logits[torch.rand(rows, vocab, generator=_generator(seed + 1)) < 0.98] = -math.inf
    logits[0] = -math.inf
    logits[-1, : vocab // 2] = math.nan
    logits[-1, -1] = math.inf
    return logits


LOGITS: dict[str, Callable[..., Tensor]] = {
    "normal": _normal,
    "flat": lambda rows, vocab, seed: _normal(rows, vocab, seed, 0.01),
    "peaked": _peaked,
    "tied": lambda rows, vocab, seed: _normal(rows, vocab, seed).round(),
    "equal": lambda rows, vocab, seed: torch.full((rows, vocab), -3.0),
    "masked": _masked,
}


def set_row(
    rows: SamplingRows,
    row: int,
    params: SamplingParams,
    prompt: Sequence[int],
    answer: Sequence[int],
    ends: Collection[int],
) -> None:
    """Write a sequence's settings into a neutral row."""
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        getattr(rows, name)[row] = getattr(params, name)
    rows.top_k[row] = params.top_k
    rows.seeds[row] = params.seed - (params.seed >> 63 << 64)
    rows.positions[row] = len(prompt) + len(answer)
    forever = 2**31 - 1
    entries = [(token, bias, forever) for token, bias in params.logit_bias]
    entries += [(token, -math.inf, forever) for token in completing(params.bad_tokens, [*prompt, *answer])]
    entries += [(token, -math.inf, len(prompt) + params.min_tokens) for token in ends]
    for entry, (token, bias, until) in enumerate(entries):
        rows.bias_ids[row, entry], rows.bias[row, entry], rows.bias_until[row, entry] = token, bias, until
    assert rows.counts is not None
    count_tokens(rows.counts[row], torch.tensor(prompt), torch.tensor(answer, dtype=torch.int64))


def mixed_rows(count: int, vocab: int, seed: int) -> SamplingRows:
    """On the CPU: each setting is off on some rows, each pair of them on together on some."""
    generator = _generator(seed)

    def pick(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)]

    rows = SamplingRows.neutral(count, vocab, ENTRIES, torch.device("cpu"), counts=True)
    rows.temperature.copy_(pick(0.0, 1e-6, 0.3, 1.0, 1.0, 2.0))
    rows.top_k.copy_(pick(0, 0, 1, 50, 1000, vocab - 1, vocab, 2**31 - 1))
    rows.top_p.copy_(pick(1.0, 1.0, 0.9, 0.5, 0.999, 1e-6))
    rows.min_p.copy_(pick(0.0, 0.0, 0.05, 1.0))
    rows.repetition_penalty.copy_(pick(1.0, 1.0, 1.3, 0.8))
    rows.frequency_penalty.copy_(pick(0.0, 0.0, 0.7, -0.3))
    rows.presence_penalty.copy_(pick(0.0, 0.0, 1.1))
    rows.seeds.copy_(torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator))
    rows.positions.copy_(torch.randint(1, 2**20, (count,), generator=generator))
    for row in range(count):
        ids = torch.randperm(vocab, generator=generator)[: ENTRIES - 1].int()
        rows.bias_ids[row, : len(ids)] = ids
        rows.bias[row, : len(ids)] = torch.randn(len(ids), generator=generator) * 5
        # The first token's bias, and a ban of it that ends at one of the next positions.
        rows.bias_ids[row, -1] = ids[0]
        rows.bias[row, -1] = -math.inf
        rows.bias_until[row, -1] = rows.positions[row] + row % 3
        prompt, answer = (torch.randint(vocab, (n,), generator=generator) for n in (60, 300))
        count_tokens(rows.counts[row], prompt, answer)
    return rows

"""What sampling parameters do to one row of logits: pure functions, each of which leaves its arguments as they are.

Their order is that of `SamplingParams`. Frequency and presence penalties are those of the OpenAI API. The repetition
penalty is from Keskar et al., "CTRL" (2019), top-p from Holtzman et al., "The curious case of neural text degeneration"
(2019), min-p from Nguyen et al., "Turning up the heat" (2024).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# How many of the most probable tokens top-p looks at, until they are enough. A full sort of 49152 logits takes 4.4 ms
# on one CPU thread, the largest 128 of them 0.13 ms.
_CANDIDATES = (128, 4096)


def add_bias(logits: Tensor, bias: Iterable[tuple[int, float]]) -> Tensor:
    """logits [vocab] with each (id, what is added); no id comes twice."""
    ids, values = zip(*bias, strict=True)
    return logits.index_add(0, torch.tensor(ids), torch.tensor(values))


def forbid(logits: Tensor, ids: Iterable[int]) -> Tensor:
    """logits [vocab] with -inf at `ids`."""
    return logits.index_fill(0, torch.tensor(list(ids), dtype=torch.int64), -math.inf)


def completing(runs: Iterable[Sequence[int]], tokens: Sequence[int]) -> list[int]:
    """The last id of every run whose other ids are the end of `tokens`: these ids would complete it."""
    return [run[-1] for run in runs if len(run) <= len(tokens) + 1 and _ends_with(tokens, run[:-1])]


def penalise_repetition(logits: Tensor, tokens: Iterable[int], penalty: float) -> Tensor:
    """logits [vocab], those of ids in `tokens` divided by the penalty where positive and multiplied where negative."""
    ids = torch.tensor(list(set(tokens)))
    seen = logits[ids]
    return logits.index_copy(0, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def penalise_counts(logits: Tensor, tokens: Iterable[int], frequency: float, presence: float) -> Tensor:
    """logits [vocab] less `frequency` for each time that an id is in `tokens`, less `presence` where it is at all."""
    counted = Counter(tokens)
    counts = torch.tensor(list(counted.values()))
    return logits.index_add(0, torch.tensor(list(counted)), -(frequency * counts + presence))


def weigh(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities of logits [n] up to a common factor, the largest 1: [n]."""
    return (logits - logits.max()).div_(temperature).exp_()


def enough(logits: Tensor, temperature: float, wanted: Tensor) -> Tensor:
    """The largest of logits [vocab], the largest first, so many that their weights reach `wanted` together: [n]."""
    vocab = logits.shape[0]
    for count in (*_CANDIDATES, vocab):
        largest = logits.topk(min(count, vocab)).values
        if weigh(largest, temperature).double().sum() >= wanted:
            break
    return largest


def top_p_count(weights: Tensor, wanted: Tensor) -> int:
    """weights [n], the largest first -> how many of them it takes to reach `wanted` together."""
    return min(int(torch.searchsorted(weights.double().cumsum_(0), wanted)) + 1, weights.shape[0])


def min_p_count(weights: Tensor, min_p: float) -> int:
    """weights [n], the largest first and 1 -> how many of them are at least `min_p`."""
    return int((weights >= min_p).sum())


def ids_of_largest(logits: Tensor, least: Tensor, count: int) -> Tensor:
    """logits [vocab] -> ids, ascending, of the `count` largest, of which `least` is the smallest: [count].

    Of those that equal it the lowest ids are taken, which `topk` does not promise.
    """
    ids = (logits >= least).nonzero()[:, 0]
    if ids.shape[0] > count:
        equal = logits[ids] == least
        ids = ids[~equal | (equal.cumsum(0) <= count - (~equal).sum())]
    return ids


def _ends_with(tokens: Sequence[int], run: Sequence[int]) -> bool:
    start = len(tokens) - len(run)
    return all(tokens[start + index] == token for index, token in enumerate(run))

"""Choosing each sequence's next token from its logits."""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from engine.logit_transforms import (
    add_bias,
    completing,
    enough,
    forbid,
    ids_of_largest,
    min_p_count,
    penalise_counts,
    penalise_repetition,
    top_p_count,
    weigh,
)
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from kernels import philox


def sample(logits: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    """logits [sequences, vocab] float32 -> the id that follows each sequence's tokens: [sequences] int64.

    An id depends on its own row's logits, sequence and settings alone, not on the rows beside it.
    """
    ids = logits.argmax(-1)
    # One row at a time: on a CPU several rows of 49152 logits leave the cache and take longer each.
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        if params.greedy and not params.changes_logits:
            continue
        changed = change_logits(logits[row], sequence)
        ids[row] = changed.argmax() if params.greedy else draw(changed, params, position=len(sequence.tokens))
    return ids


def change_logits(logits: Tensor, sequence: Sequence) -> Tensor:
    """logits [vocab] with the sequence's bias, bans and penalties."""
    params, tokens = sequence.sampling, sequence.tokens
    if params.logit_bias:
        logits = add_bias(logits, params.logit_bias)
    if params.bad_tokens:
        logits = forbid(logits, completing(params.bad_tokens, tokens))
    answer_len = len(tokens) - sequence.prompt_len
    if answer_len < params.min_tokens:
        vocab = logits.shape[0]  # a model's own end ids may lie past it
        logits = forbid(logits, (token for token in sequence.end_ids if token < vocab))
    if params.repetition_penalty != 1.0:
        logits = penalise_repetition(logits, tokens, params.repetition_penalty)
    if answer_len and (params.frequency_penalty or params.presence_penalty):
        answer = tokens[sequence.prompt_len :]
        logits = penalise_counts(logits, answer, params.frequency_penalty, params.presence_penalty)
    return logits


def draw(logits: Tensor, params: SamplingParams, position: int) -> int:
    """logits [vocab] -> an id, by the number that belongs to the seed and the position."""
    number = philox.uniform(params.seed, position)
    kept = keep(logits, params)
    if kept is None:
        return _invert(weigh(logits, params.temperature), number)
    return int(kept[_invert(weigh(logits[kept], params.temperature), number)])


def keep(logits: Tensor, params: SamplingParams) -> Tensor | None:
    """The ids that top-k, top-p and min-p leave of logits [vocab], ascending; None for all."""
    if 0 < params.top_k < logits.shape[0]:
        largest = logits.topk(params.top_k).values
        wanted = params.top_p * weigh(largest, params.temperature).double().sum()
    elif params.top_p < 1.0:
        wanted = params.top_p * weigh(logits, params.temperature).double().sum()
        largest = enough(logits, params.temperature, wanted)
    elif params.min_p > 0.0:
        return (weigh(logits, params.temperature) >= params.min_p).nonzero()[:, 0]
    else:
        return None
    weights = weigh(largest, params.temperature)  # [n], the largest first
    count = min(top_p_count(weights, wanted), min_p_count(weights, params.min_p))
    return ids_of_largest(logits, largest[count - 1], count)


def _invert(weights: Tensor, number: float) -> int:
    """weights [n] -> the first index whose cumulative weight is above `number`, in [0, 1), of them all."""
    mass = weights.double().cumsum_(0)
    total = mass[-1]
    # Rounding must not lift the target to the total: no index has a mass above that.
    target = torch.minimum(number * total, total.nextafter(total * 0))
    return int(torch.searchsorted(mass, target, right=True))

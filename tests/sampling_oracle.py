"""The rules of sampling by definition, in plain Python: slow, float64, one row at a time."""

import math
from collections.abc import Collection, Sequence
from random import Random

from engine.sampling_params import SamplingParams


def changed(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], answer: Sequence[int], ends: Collection[int]
) -> list[float]:
    """The logits after bias, bans and penalties."""
    out, tokens = list(logits), [*prompt, *answer]
    for token, bias in params.logit_bias:
        out[token] += bias
    for run in params.bad_tokens:
        if tokens[len(tokens) - len(run) + 1 :] == list(run[:-1]):
            out[run[-1]] = -math.inf
    if len(answer) < params.min_tokens:
        for token in ends:
            out[token] = -math.inf
    for token in set(tokens):
        out[token] *= params.repetition_penalty if out[token] <= 0 else 1 / params.repetition_penalty
    for token in set(answer):
        out[token] -= params.frequency_penalty * list(answer).count(token) + params.presence_penalty
    return out


def probabilities(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Of each id, from changed logits: 0 for those that are not kept."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.greedy:
        return [float(token == ranked[0]) for token in range(len(logits))]
    if params.top_k:
        ranked = ranked[: params.top_k]
    weights = {token: math.exp((logits[token] - logits[ranked[0]]) / params.temperature) for token in ranked}
    wanted, mass, kept = params.top_p * math.fsum(weights.values()), 0.0, []
    for token in ranked:
        if mass < wanted and weights[token] >= params.min_p:
            kept.append(token)
        mass += weights[token]
    total = math.fsum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


def drawn(chances: Sequence[float], number: float) -> tuple[int, float]:
    """(the id at `number`, in [0, 1), of the cumulative distribution over ids in order, how far the next border is)."""
    mass, borders = 0.0, []
    for chance in chances:
        mass += chance
        borders.append(mass)
    token = next((t for t, border in enumerate(borders) if border > number), max(t for t, c in enumerate(chances) if c))
    return token, min(abs(border - number) for border in borders)


def random_case(rng: Random, vocab: int) -> tuple[SamplingParams, list[int], list[int], list[int]]:
    """(settings of all kinds, prompt, answer, end ids), as workers are told them."""
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 5, vocab, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.3, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.03, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.0, 0.5, 2.0]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5, -1.0]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5, -1.0]),
        logit_bias=tuple((token, rng.uniform(-5, 5)) for token in rng.sample(range(vocab), rng.choice([0, 3]))),
        bad_tokens=tuple((rng.randrange(vocab),) * rng.choice([1, 2]) for _ in range(rng.choice([0, 2]))),
        min_tokens=rng.choice([0, 3, 8]),
        seed=rng.randrange(2**64),
    )
    prompt = [rng.randrange(vocab) for _ in range(rng.randrange(1, 20))]
    answer = [rng.randrange(vocab) for _ in range(rng.randrange(6))]
    rounded = SamplingParams.from_proto(params.to_proto(), default_seed=0)
    return rounded, prompt, answer, rng.sample(range(vocab), 2)

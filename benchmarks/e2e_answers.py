"""Greedy answers with log-probabilities, and how far two ways to compute them are apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.client import Client
from protos.v1.common_pb2 import TokenLogprobs

TOP = 20  # log-probabilities of so many tokens are compared at each place


@dataclass(frozen=True)
class Answer:
    """The ids of a greedy answer, and what each was chosen from."""

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


async def ask(client: Client, prompt: Sequence[int], tokens: int) -> Answer:
    done = await client.complete(
        token_ids=prompt, max_tokens=tokens, ignore_eos=True, logprobs=TOP, deadline_s=120, temperature=0
    )
    assert len(done.token_ids) == len(done.logprobs) == tokens
    return Answer(done.token_ids, done.logprobs)


def distance(one: TokenLogprobs, other: TokenLogprobs) -> float:
    """The largest difference of a log-probability, in nats, over the tokens that are likeliest for both.

    Infinite where the choice of one is not among the likeliest of the other.
    """
    mine, theirs = _likeliest(one), _likeliest(other)
    if one.token_id not in theirs or other.token_id not in mine:
        return float("inf")
    return max(abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys())


def compare(ones: Mapping[str, Answer], others: Mapping[str, Answer], bound: float) -> dict[str, Any]:
    """Two sets of answers to the same prompts.

    Up to the first token that differs, that one included, both computed the same text: there all log-probabilities
    must be within `bound`. What comes after it is another text, and is not compared.
    """
    places, apart, differing = 0, 0.0, []
    for name, one in ones.items():
        other = others[name]
        first = next((i for i, pair in enumerate(zip(one.ids, other.ids, strict=True)) if pair[0] != pair[1]), None)
        compared = len(one.ids) if first is None else first + 1
        found = [distance(a, b) for a, b in zip(one.logprobs[:compared], other.logprobs[:compared], strict=True)]
        places, apart = places + compared, max(apart, *found)
        if first is not None:
            differing.append(_difference(name, first, one.logprobs[first], other.logprobs[first]))
    return {
        "prompts": len(ones),
        "prompts_with_equal_tokens": len(ones) - len(differing),
        "places_compared": places,
        "largest_logprob_difference": apart,
        "bound": bound,
        "within_bound": apart <= bound,
        "differing": differing,
    }


def _difference(name: str, place: int, one: TokenLogprobs, other: TokenLogprobs) -> dict[str, Any]:
    """The first token that differs: by how much each side preferred its own."""
    mine, theirs = _likeliest(one), _likeliest(other)
    return {
        "prompt": name,
        "place": place,
        "tokens": [one.token_id, other.token_id],
        "preferred_by": [
            one.logprob - mine.get(other.token_id, float("-inf")),
            other.logprob - theirs.get(one.token_id, float("-inf")),
        ],
    }


def _likeliest(found: TokenLogprobs) -> dict[int, float]:
    return dict(zip(found.top_ids, found.top_logprobs, strict=True))

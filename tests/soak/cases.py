"""Prompts that share prefixes, each with the answer that one engine alone gives."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.loader import load_model
from engine.sampling_params import SamplingParams
from engine_alone import make_engine, run
from protos.v1 import common_pb2
from tiny_model import EOS_ID

TRUNKS = 40
TAILS = 6  # of each trunk
PAGE = 16


@dataclass(frozen=True)
class Case:
    """What is asked, and the tokens of the only right answer."""

    prompt: tuple[int, ...]
    sampling: dict[str, Any]
    answer: tuple[int, ...]


def make_cases(model: Path, seed: int) -> list[Case]:
    """Each answer is computed twice, in batches and chunks of different sizes. `ValueError` where they differ."""
    rng = random.Random(seed)
    asked = [(prompt, _sampling(rng)) for prompt in _prompts(rng)]
    torch.set_num_threads(1)
    decoder = load_model(model, "float32", "cpu").model
    jobs = [(list(prompt), _params(sampling)) for prompt, sampling in asked]
    first, second = (run(make_engine(decoder, budget), jobs, {EOS_ID}) for budget in (16, 80))
    cases = []
    for (prompt, sampling), one, other in zip(asked, first, second, strict=True):
        if one.tokens != other.tokens:
            raise ValueError("a clean answer depends on its batch: nothing can be compared with it")
        cases.append(Case(prompt, sampling, tuple(one.tokens[len(prompt) :])))
    return cases


def _prompts(rng: random.Random) -> list[tuple[int, ...]]:
    """Trunks of 2 to 8 pages; what follows is a page and a half on average, and ends anywhere in a page."""
    prompts = []
    for _ in range(TRUNKS):
        trunk = rng.choices(range(3, 250), k=PAGE * rng.randint(2, 8) + rng.randrange(PAGE))
        prompts += [(*trunk, *rng.choices(range(3, 250), k=rng.randint(1, 3 * PAGE))) for _ in range(TAILS)]
    return prompts


def _sampling(rng: random.Random) -> dict[str, Any]:
    length = {"max_tokens": rng.randint(2, 32)}
    if rng.random() < 0.5:
        return length
    return length | {
        "temperature": rng.choice([0.7, 1.0]),
        "top_p": rng.choice([0.9, 1.0]),
        "seed": rng.getrandbits(32),
    }


def _params(sampling: dict[str, Any]) -> SamplingParams:
    return SamplingParams.from_proto(common_pb2.SamplingParams(**sampling), default_seed=0)

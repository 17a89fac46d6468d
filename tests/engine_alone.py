"""Answers of one engine by itself, on the CPU: no service, no hand-over."""

from collections.abc import Collection, Iterable

import engine_rig
from engine.engine import Engine
from engine.model import Decoder
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from kvstore.keys import page_keys

PAGE = 4


def make_engine(model: Decoder, token_budget: int = 16) -> Engine:
    """Of eight sequences at most."""
    sizes = {"page_size": PAGE, "num_pages": 512, "token_budget": token_budget, "max_sequences": 8}
    return engine_rig.make_engine(model, ModelRunner, **sizes)


def run(
    engine: Engine, jobs: Iterable[tuple[list[int], SamplingParams]], ends: Collection[int] = (2,)
) -> list[Sequence]:
    """Prompts side by side. Each sequence at its end, with all the log-probabilities that it asked for."""
    sequences = []
    for index, (prompt, params) in enumerate(jobs):
        keys, longest = page_keys(engine_rig.ROOT, prompt, PAGE), len(prompt) + params.max_tokens
        one = Sequence(str(index), list(prompt), len(prompt), longest, params, frozenset(ends), keys, engine_rig.ROOT)
        engine.scheduler.add(one)
        sequences.append(one)
    while engine.scheduler.has_work:
        for progress in engine.step():
            if progress.finish is not None:
                engine.scheduler.drop(progress.sequence)
    return sequences

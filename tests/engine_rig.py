"""An engine over a model and a pool, and work for it: sequences that come, go on and are dropped at given steps."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine import sequence as engine_sequence
from engine.answer_lengths import Expectation
from engine.config import EngineConfig
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Finish
from kvstore.keys import PageKey, page_keys
from kvstore.pool import PagePool

ROOT = PageKey(bytes(16))
GREEDY = SamplingParams()


@dataclass(frozen=True)
class Request:
    """What a sequence is made of, anew for each run. It arrives before step `at`."""

    at: int
    name: str
    prompt: tuple[int, ...]
    answer_len: int
    end_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = GREEDY

    def sequence(self, page_size: int) -> engine_sequence.Sequence:
        return engine_sequence.Sequence(
            request_id=self.name,
            tokens=list(self.prompt),
            prompt_len=len(self.prompt),
            max_len=len(self.prompt) + self.answer_len,
            sampling=self.sampling,
            end_ids=self.end_ids,
            keys=page_keys(ROOT, list(self.prompt), page_size),
            root=ROOT,
        )


class Hopes(Expectation):
    """Expects of every answer that only a few tokens are to come, so that pages run out where there are few."""

    def __init__(self, tokens: int = 1) -> None:
        self.tokens = tokens

    def note(self, length, ended):
        pass

    def expected(self, answered, most, share):
        return min(most, answered + self.tokens)


def make_engine(model, runner_class, *, page_size=4, num_pages=64, lengths=None, **settings) -> Engine:
    """The pool starts as NaN: what is read before it was written shows."""
    settings = {"token_budget": 24, "max_sequences": 12} | settings
    config = EngineConfig(page_size=page_size, num_pages=num_pages, **settings)
    m = model.config
    shape = (num_pages, m.layers, 2, m.kv_heads, page_size, m.head_dim)
    cache = torch.full(shape, float("nan"), dtype=model.cache_dtype, device=model.device)
    scheduler = Scheduler(PagePool(num_pages), config, lengths=lengths)
    return Engine(scheduler, runner_class(model, cache, config))


def run(
    engine: Engine,
    work: Sequence[Request],
    drops: Mapping[int, Sequence[str]] = {},
    keep: dict[str, engine_sequence.Sequence] | None = None,
) -> tuple[dict[str, list[int]], dict[str, Finish]]:
    """What each sequence got, and how it ended. `drops` names sequences that are dropped before a step; `keep`
    receives all sequences.
    """
    answers: dict[str, list[int]] = {request.name: [] for request in work}
    finishes: dict[str, Finish] = {}
    live: dict[str, engine_sequence.Sequence] = {}
    last = max(request.at for request in work)
    step = 0
    while step <= last or engine.scheduler.has_work:
        for request in work:
            if request.at == step:
                live[request.name] = request.sequence(engine.scheduler.config.page_size)
                engine.scheduler.add(live[request.name])
                if keep is not None:
                    keep[request.name] = live[request.name]
        for name in drops.get(step, ()):
            if name in live:
                engine.scheduler.drop(live.pop(name))
        for progress in engine.step():
            name = progress.sequence.request_id
            assert name in live, "progress of a sequence that ended"
            if progress.token is not None:
                answers[name].append(progress.token)
            if progress.finish is not None:
                finishes[name] = progress.finish
                engine.scheduler.drop(live.pop(name))
        step += 1
        assert step < 2000
    pool = engine.scheduler.pool
    assert (pool.held_pages, pool.available_pages) == (0, pool.total_pages)
    return answers, finishes


def random_work(seed: int, count: int, *, steps: int = 40, vocab: int = 300, longest: int = 40) -> list[Request]:
    """Prompts that share prefixes or do not, answers of many lengths; half of them may meet an end token."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, vocab) for _ in range(longest)]
    work = []
    for name in range(count):
        prefix = shared[: rng.choice([0, 0, longest // 5, longest // 2])]
        prompt = prefix + [rng.randrange(3, vocab) for _ in range(rng.randrange(1, longest))]
        ends = frozenset(rng.sample(range(vocab), vocab // 5) if rng.random() < 0.5 else ())
        work.append(Request(rng.randrange(steps), str(name), tuple(prompt), rng.randrange(1, 30), ends))
    return work

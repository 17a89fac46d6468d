"""What it gives to promise pages for expected answers instead of longest ones: python -m benchmarks.preemption

The engine's own scheduler and pool under a script in place of a model: requests that allow far longer answers than they
get, all there from the start. Every policy has the same requests and the same pool. No time is taken: what is counted
is steps, and tokens that were computed more than once. `whole answers` still counts on the pages of those that will
have ended by then.
"""

import argparse
import random
from itertools import product
from typing import Any

from benchmarks.record import write_result
from engine.answer_lengths import AnswerLengths, Expectation
from engine.config import EngineConfig
from engine.engine import Done, Engine
from engine.sampling_params import SamplingParams
from engine.scheduler import Chunk, Scheduler
from engine.sequence import Sequence
from kvstore.keys import PageKey, page_keys
from kvstore.pool import PagePool
from kvstore.reuse_rate import ReuseRate

ROOT = PageKey(bytes(16))
PAGE = 64
END = 1


class Whole(Expectation):
    """Expects every answer to be as long as it may."""

    def note(self, length: int, ended: bool) -> None:
        pass

    def expected(self, answered: int, most: int, share: float) -> int:
        return most


class Nothing(Whole):
    """Expects one token more of every answer, so that credit covers the prompt alone."""

    def expected(self, answered: int, most: int, share: float) -> int:
        return min(most, answered + 1)


POLICIES: dict[str, type[Expectation]] = {"whole answers": Whole, "expected answers": AnswerLengths, "prompts": Nothing}


class Script:
    """Ends each answer at the length that was drawn for it."""

    behind = 1

    def __init__(self, lengths: dict[str, int]) -> None:
        self._lengths = lengths
        self.steps = self.rows = self.computed = 0

    def launch(self, chunks: list[Chunk]) -> Done:
        self.steps += 1
        self.rows += sum(chunk.is_row for chunk in chunks)
        self.computed += sum(chunk.count for chunk in chunks)
        return Done([self._sample(chunk.sequence) for chunk in chunks if chunk.is_last])

    def _sample(self, sequence: Sequence) -> int:
        answered = len(sequence.tokens) + sequence.unread - sequence.prompt_len
        return END if answered + 1 >= self._lengths[sequence.request_id] else 2


def requests(count: int, median: int, most: int, seed: int) -> tuple[list[Sequence], dict[str, int]]:
    """Prompts of 100 to 1,000 tokens; answers that spread around their median, some to several times that."""
    rng = random.Random(seed)
    sequences, lengths = [], {}
    for name in map(str, range(count)):
        prompt = [rng.randrange(2, 1000) for _ in range(rng.randrange(100, 1000))]
        lengths[name] = max(1, min(most, round(median * rng.lognormvariate(0.0, 0.8))))
        sequences.append(
            Sequence(
                request_id=name,
                tokens=prompt,
                prompt_len=len(prompt),
                max_len=len(prompt) + most,
                sampling=SamplingParams(max_tokens=most),
                end_ids=frozenset({END}),
                keys=page_keys(ROOT, prompt, PAGE),
                root=ROOT,
            )
        )
    return sequences, lengths


def measure(policy: str, pages: int, median: int, most: int, count: int, seed: int) -> dict[str, Any]:
    """Serve all requests; what it took."""
    config = EngineConfig(page_size=PAGE, num_pages=pages, token_budget=2048, max_sequences=256, max_waiting=count)
    scheduler = Scheduler(PagePool(pages, policy=ReuseRate(pages)), config, lengths=POLICIES[policy]())
    sequences, lengths = requests(count, median, most, seed)
    engine = Engine(scheduler, script := Script(lengths))
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work:
        for progress in engine.step():
            if progress.finish is not None:
                scheduler.drop(progress.sequence)
    needed = sum(len(s.tokens) - 1 for s in sequences)
    return {
        "policy": policy,
        "pages": pages,
        "median_answer": median,
        "max_tokens": most,
        "steps": script.steps,
        "sequences_per_1000_steps": round(1000 * count / script.steps, 1),
        "rows_a_step": round(script.rows / script.steps, 1),
        "preemptions": scheduler.preemptions,
        "computed_again": round(script.computed / needed - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--answers", type=int, nargs="+", default=[150, 600], help="medians, in tokens")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    for pages, median, policy in product(arguments.pages, arguments.answers, POLICIES):
        rows.append(measure(policy, pages, median, arguments.max_tokens, arguments.requests, arguments.seed))
        print(rows[-1], flush=True)
    print(write_result("preemption", {"page_size": PAGE, "requests": arguments.requests, "rows": rows}))


if __name__ == "__main__":
    main()

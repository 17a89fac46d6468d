"""Continuous batching over one model and one page pool."""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from engine.scheduler import Chunk, Scheduler
from engine.sequence import Finish, Sequence


class Runner(Protocol):
    """What computes: `engine.runner.ModelRunner`, or a script in a test."""

    def run(self, chunks: list[Chunk]) -> list[int]:
        """Compute the chunks; returns a sampled id for each chunk that `is_last`, in order."""


@dataclass(frozen=True)
class Progress:
    """What one step did for one sequence."""

    sequence: Sequence
    token: int | None  # sampled, where the chunk was the last
    finish: Finish | None


@dataclass
class StepTimes:
    """What steps measured, for placement. An exponential average follows load without jumping at one slow step."""

    tokens_per_s: float = 0.0
    step_ms: float = 0.0
    _weight: float = field(default=0.2, repr=False)

    def note(self, tokens: int, seconds: float) -> None:
        self.tokens_per_s = self._mix(self.tokens_per_s, tokens / seconds)
        self.step_ms = self._mix(self.step_ms, seconds * 1e3)

    def _mix(self, old: float, new: float) -> float:
        return new if old == 0.0 else old + self._weight * (new - old)


class Engine:
    """Computes sequences. Not thread-safe: one thread steps it and talks to it."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.times = StepTimes()
        self._runner = runner

    def step(self) -> list[Progress]:
        """Schedule, run, sample, publish: one token for each decode row, one chunk for each prompt that fits."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        started = perf_counter()
        ids = iter(self._runner.run(chunks))
        self.times.note(sum(chunk.count for chunk in chunks), perf_counter() - started)
        return [self._advance(chunk, next(ids) if chunk.is_last else None) for chunk in chunks]

    def _advance(self, chunk: Chunk, token: int | None) -> Progress:
        self.scheduler.advance(chunk.sequence, chunk.count)
        finish = None if token is None else chunk.sequence.append(token)
        return Progress(chunk.sequence, token, finish)

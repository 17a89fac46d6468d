"""Continuous batching over one model and one page pool."""

from collections import deque
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple, Protocol

from engine.scheduler import Chunk, Scheduler
from engine.sequence import Finish, Sequence


class Launched(Protocol):
    """One step's computation, under way or done."""

    def ids(self) -> list[int]:
        """Wait for the step; a sampled id for each chunk that `is_last`, in order."""


@dataclass(frozen=True)
class Done:
    """A step that was computed when it was launched."""

    sampled: list[int]

    def ids(self) -> list[int]:
        return self.sampled


class Runner(Protocol):
    """What computes: `engine.runner.ModelRunner`, `engine.device_runner.DeviceRunner`, or a script in a test."""

    behind: int  # steps that may be under way while the next is scheduled: 0 where `launch` computes, else 1

    def launch(self, chunks: list[Chunk]) -> Launched:
        """Start computing the chunks, after all that was launched before."""


class Progress(NamedTuple):
    """What one step did for one sequence."""

    sequence: Sequence
    token: int | None  # sampled, where the chunk was the last
    finish: Finish | None
    launched: float  # when the step was: seconds, as `time.monotonic` counts them


@dataclass
class StepTimes:
    """What steps measured, for placement. An exponential average follows load without jumping at one slow step."""

    tokens_per_s: float = 0.0  # of steps that computed prompts: a step of decode rows alone has few tokens
    step_ms: float = 0.0  # of steps that had decode rows
    _weight: float = field(default=0.2, repr=False)

    def note(self, chunks: list[Chunk], seconds: float) -> None:
        if not chunks[-1].is_row:  # rows come first
            self.tokens_per_s = self._mix(self.tokens_per_s, sum(chunk.count for chunk in chunks) / seconds)
        if chunks[0].is_row:
            self.step_ms = self._mix(self.step_ms, seconds * 1e3)

    def _mix(self, old: float, new: float) -> float:
        return new if old == 0.0 else old + self._weight * (new - old)


@dataclass(frozen=True)
class _Step:
    chunks: list[Chunk]
    launched: Launched
    started: float


class Engine:
    """Computes sequences. Not thread-safe: one thread steps it and talks to it.

    On a GPU the next step is launched before the last one's tokens are read, so that the GPU never waits for the host.
    A sequence that turns out to have ended is then in one step too many, whose result for it is for nobody.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.times = StepTimes()
        self.idle = True  # the last step found nothing to do, and until there is news the next one will not either
        self._runner = runner
        self._under_way: deque[_Step] = deque()
        self._collected = 0.0  # when the last step was

    def step(self) -> list[Progress]:
        """Schedule, launch, collect, publish: one token for each decode row, one chunk for each prompt that fits."""
        chunks = self.scheduler.schedule()
        if chunks:
            self._launch(chunks)
        allowed = self._runner.behind if chunks else 0
        progress: list[Progress] = []
        while len(self._under_way) > allowed:
            progress += self._collect(self._under_way.popleft())
        self.idle = not (chunks or progress)
        return progress

    def _launch(self, chunks: list[Chunk]) -> None:
        started = monotonic()
        self._under_way.append(_Step(chunks, self._runner.launch(chunks), started))
        self.scheduler.launched(chunks)

    def _collect(self, step: _Step) -> list[Progress]:
        """Wait for a step and note what it gave."""
        ids = iter(step.launched.ids())
        now = monotonic()
        self.times.note(step.chunks, now - max(step.started, self._collected))
        self._collected = now
        tokens = [(chunk, next(ids) if chunk.is_last else None) for chunk in step.chunks]
        return [self._advance(chunk, token, step.started) for chunk, token in tokens if not chunk.sequence.dropped]

    def _advance(self, chunk: Chunk, token: int | None, launched: float) -> Progress:
        sequence = chunk.sequence
        self.scheduler.read(chunk)
        if token is None:
            return Progress(sequence, None, None, launched)
        return Progress(sequence, token, sequence.append(token), launched)

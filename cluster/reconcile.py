"""Desired against actual: which workers to start, drain and stop. Pure functions; the clock is passed in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum


class Phase(Enum):
    """Where a worker is in its life. What is gone is no longer listed."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # takes nothing new, finishes what it has
    STOPPING = "stopping"


@dataclass(frozen=True)
class Policy:
    """How patient the controller is. Times are seconds."""

    first_delay_s: float = 0.25  # before the first replacement
    max_delay_s: float = 30.0
    max_failures: int = 4  # in a row, before the pool is reported as failed
    stable_s: float = 20.0  # a worker that was ready for so long ends a row of failures
    drain_timeout_s: float = 900.0


@dataclass(frozen=True)
class WorkerView:
    """One worker as the controller sees it."""

    worker_id: str
    number: int  # counts up: the newest has the highest
    phase: Phase
    since: float  # when it entered the phase
    load: int = 0  # sequences it has, running and waiting
    idle: bool = False  # while draining: nothing is left to finish


@dataclass(frozen=True)
class Failures:
    """A row of failures of one pool. Those that fall into one delay count once: a dead node is one failure."""

    count: int = 0
    retry_at: float = 0.0
    reason: str = ""
    hopeless: bool = False  # an operator must change something first

    def add(self, reason: str, now: float, policy: Policy, hopeless: bool = False) -> "Failures":
        """One more worker has failed."""
        if self.count and now < self.retry_at:
            return replace(self, reason=reason, hopeless=self.hopeless or hopeless)
        delay = min(policy.max_delay_s, policy.first_delay_s * 2**self.count)
        return Failures(self.count + 1, now + delay, reason, hopeless)

    def is_failed(self, policy: Policy) -> bool:
        """Whether the pool is to be reported as failed. It is still tried again, at the longest delay."""
        return self.hopeless or self.count >= policy.max_failures


@dataclass(frozen=True)
class Pool:
    """What one pool should be and is."""

    desired: int
    workers: tuple[WorkerView, ...] = ()
    failures: Failures = Failures()


@dataclass(frozen=True)
class Start:
    """Start one worker of the pool."""

    pool: str


@dataclass(frozen=True)
class Drain:
    """Let the worker finish what it has, then report itself idle."""

    pool: str
    worker_id: str


@dataclass(frozen=True)
class Stop:
    """End the worker."""

    pool: str
    worker_id: str


Action = Start | Drain | Stop


def reconcile(pools: Mapping[str, Pool], now: float, policy: Policy) -> list[Action]:
    """The next moves, each pool alone. Empty when actual is as desired, or only waiting is left."""
    actions: list[Action] = []
    for name, pool in pools.items():
        actions += _finish_draining(name, pool, now, policy)
        active = [worker for worker in pool.workers if worker.phase in (Phase.STARTING, Phase.READY)]
        missing = pool.desired - len(active)
        if missing > 0:
            actions += _grow(name, pool, missing, now)
        elif missing < 0:
            actions += _shrink(name, active, -missing)
    return actions


def settle(pool: Pool, now: float, policy: Policy) -> Failures:
    """The pool's failures, forgotten once as many workers as desired have been ready for long enough."""
    stable = [
        worker for worker in pool.workers if worker.phase is Phase.READY and now - worker.since >= policy.stable_s
    ]
    return Failures() if len(stable) >= pool.desired else pool.failures


def _finish_draining(name: str, pool: Pool, now: float, policy: Policy) -> list[Action]:
    return [
        Stop(name, worker.worker_id)
        for worker in pool.workers
        if worker.phase is Phase.DRAINING and (worker.idle or now - worker.since >= policy.drain_timeout_s)
    ]


def _grow(name: str, pool: Pool, missing: int, now: float) -> list[Action]:
    """All that are missing at once after the delay; one at a time where their replacements failed as well."""
    failures = pool.failures
    if failures.count and now < failures.retry_at:
        return []
    if failures.count < 2:
        return [Start(name)] * missing
    is_trying = any(worker.phase is Phase.STARTING for worker in pool.workers)
    return [] if is_trying else [Start(name)]


def _shrink(name: str, active: Sequence[WorkerView], surplus: int) -> list[Action]:
    """Those that have not started lose nothing; then the least loaded, the newest first among equals."""

    def cost(worker: WorkerView) -> tuple[bool, int, int]:
        return worker.phase is Phase.READY, worker.load, -worker.number

    leaving = sorted(active, key=cost)[:surplus]
    return [
        Drain(name, worker.worker_id) if worker.phase is Phase.READY else Stop(name, worker.worker_id)
        for worker in leaving
    ]

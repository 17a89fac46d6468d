"""Which workers take a request: the prefill and decode worker, or the colocated one, with the least predicted time.

Pure functions: the clock, the loads and what each worker holds are arguments. All predictions are milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest

# A worker that has not yet computed anything has no measured rate; any value serves until its first step.
FIRST_RATE = 1000.0  # tokens/s
FIRST_STEP_MS = 20.0
# Bytes/s that each transport is taken to move. shm is a memory copy, tcp one stream over loopback or 10 GbE.
BANDWIDTH = {"shm": 4e9, "tcp": 1e9}
# What moves beside prefill is not free: it takes bandwidth from others. This share of its time counts.
HIDDEN_SHARE = 0.1
# A decode step costs, before its first sequence, about what this many sequences add to it (it reads the weights once).
STEP_BASE_SEQUENCES = 16
# Tokens that an answer is taken to have when its max_tokens allows more.
TYPICAL_ANSWER = 128
# Only the best of each pool are paired, so that a pool of hundreds costs no more than one of these many.
SHORTLIST = 8


@dataclass(frozen=True)
class Job:
    """What a request asks of the workers."""

    prompt_tokens: int
    max_tokens: int
    page_size: int
    page_bytes: int

    @property
    def prompt_pages(self) -> int:
        return -(-self.prompt_tokens // self.page_size)

    @property
    def total_pages(self) -> int:
        """Pages that hold prompt and answer; the answer's last token is never written to one."""
        return -(-(self.prompt_tokens + self.max_tokens - 1) // self.page_size)


@dataclass(frozen=True)
class Candidate:
    """What is known of one worker. `measured_at` is when its load was, on the clock that `choose` is given."""

    worker_id: str
    incarnation: int
    host: str
    transports: tuple[str, ...]  # best first
    max_tokens: int
    prefix_pages: int  # leading full pages of this prompt that it holds
    queued_tokens: int  # as measured
    newer_tokens: int  # asked for since
    tokens_per_s: float
    running: int
    waiting: int
    step_ms: float
    available_pages: int
    held_pages: int
    measured_at: float

    @property
    def name(self) -> tuple[str, int]:
        return self.worker_id, self.incarnation


@dataclass(frozen=True)
class Cost:
    """The formula: total = queue + compute + hand_over + decode."""

    queue_ms: float
    compute_ms: float
    hand_over_ms: float
    decode_ms: float

    @property
    def ttft_ms(self) -> float:
        return self.queue_ms + self.compute_ms

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.compute_ms + self.hand_over_ms + self.decode_ms

    def __str__(self) -> str:
        return (
            f"{self.total_ms:.1f} ms = queue {self.queue_ms:.1f} + compute {self.compute_ms:.1f}"
            f" + hand-over {self.hand_over_ms:.1f} + decode {self.decode_ms:.1f}"
        )


@dataclass(frozen=True)
class Placement:
    """The chosen pair, and why. A colocated worker is both."""

    prefill: Candidate
    decode: Candidate
    cost: Cost


def choose(
    prefills: Sequence[Candidate],
    decodes: Sequence[Candidate],
    job: Job,
    now: float,
    colocated: Sequence[Candidate] = (),
) -> Placement | None:
    """The pair, or the one worker, with the least predicted time; None where none is large enough."""
    fitting = [c for c in prefills if c.max_tokens > job.prompt_tokens]
    roomy = [c for c in decodes if c.max_tokens >= job.prompt_tokens + job.max_tokens]
    first = nsmallest(SHORTLIST, fitting, key=lambda c: queue_ms(c, now) + compute_ms(c, job))
    second = nsmallest(SHORTLIST, roomy, key=lambda c: decode_ms(c, job))
    placements = [Placement(p, d, predict(p, d, job, now)) for p in first for d in second]
    whole = [c for c in colocated if c.max_tokens >= job.prompt_tokens + job.max_tokens]
    placements += [Placement(c, c, predict_colocated(c, job, now)) for c in whole]
    return min(placements, key=lambda pair: pair.cost.total_ms, default=None)


def predict(prefill: Candidate, decode: Candidate, job: Job, now: float) -> Cost:
    """What a request would cost on this pair."""
    compute = compute_ms(prefill, job)
    return Cost(
        queue_ms=queue_ms(prefill, now),
        compute_ms=compute,
        hand_over_ms=hand_over_ms(prefill, decode, job, compute),
        decode_ms=decode_ms(decode, job),
    )


def predict_colocated(worker: Candidate, job: Job, now: float) -> Cost:
    """What a request would cost on this worker alone: nothing is handed over."""
    return Cost(queue_ms(worker, now), compute_ms(worker, job), 0.0, decode_ms(worker, job))


def queue_ms(worker: Candidate, now: float) -> float:
    """Time until what is queued has been computed; what was measured has moved on since."""
    per_ms = (worker.tokens_per_s or FIRST_RATE) / 1e3
    measured = worker.queued_tokens / per_ms - 1e3 * (now - worker.measured_at)
    return max(0.0, measured) + worker.newer_tokens / per_ms


def uncached_tokens(worker: Candidate, job: Job) -> int:
    """Tokens that no held page saves. The last token is always computed: it gives the logits."""
    reusable = min(worker.prefix_pages, (job.prompt_tokens - 1) // job.page_size)
    return job.prompt_tokens - reusable * job.page_size


def compute_ms(worker: Candidate, job: Job) -> float:
    """Time to compute what is not cached."""
    return 1e3 * uncached_tokens(worker, job) / (worker.tokens_per_s or FIRST_RATE)


def hand_over_ms(prefill: Candidate, decode: Candidate, job: Job, compute: float) -> float:
    """Time that moving pages adds. All but the last page can move while prefill computes."""
    missing = job.prompt_pages - min(decode.prefix_pages, job.prompt_tokens // job.page_size)
    if missing == 0:
        return 0.0
    page_ms = 1e3 * job.page_bytes / _bandwidth(prefill, decode)
    hidden = min((missing - 1) * page_ms, compute)
    return missing * page_ms - hidden + HIDDEN_SHARE * hidden


def decode_ms(worker: Candidate, job: Job) -> float:
    """Time until there is room, then the answer's steps at the pace of a batch that has one sequence more."""
    step = worker.step_ms or FIRST_STEP_MS
    batch = worker.running + worker.waiting
    slowed = step * (STEP_BASE_SEQUENCES + batch + 1) / (STEP_BASE_SEQUENCES + worker.running)
    return _room_ms(worker, job, step) + min(job.max_tokens, TYPICAL_ANSWER) * slowed


def _room_ms(worker: Candidate, job: Job, step: float) -> float:
    """Time until enough pages are free: held pages are taken to turn over once in a typical answer's time."""
    wanted = (worker.waiting + 1) * job.total_pages  # those that wait are taken to be like this one
    short = max(0, wanted - worker.available_pages)
    return TYPICAL_ANSWER * step * short / max(1, worker.held_pages)


def _bandwidth(prefill: Candidate, decode: Candidate) -> float:
    """Of the first transport that reaches: shared memory only within a host."""
    near = prefill.host == decode.host
    usable = (BANDWIDTH[t] for t in prefill.transports if t in BANDWIDTH and (near or t != "shm"))
    return next(usable, BANDWIDTH["tcp"])

"""Which workers take a request: the prefill and decode worker, or the colocated one, with the least predicted time.

Pure functions: the clock, the loads and what each worker holds are arguments. All predictions are milliseconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest

from kvstore.directory import WorkerRecord

# A worker that has not yet computed anything has no measured rate; any value serves until its first step.
FIRST_RATE = 1000.0  # tokens/s
FIRST_STEP_MS = 20.0
# Bytes/s that each transport is taken to move to a worker that has not yet had pages by it: cuda_ipc between GPUs of
# one host, at a part of NVLink's rate; shm is a memory copy; nixl and tcp as a 10 GbE network allows.
BANDWIDTH = {"cuda_ipc": 1e11, "shm": 4e9, "nixl": 1e9, "tcp": 1e9}
WITHIN_A_HOST = ("cuda_ipc", "shm")
# What moves beside prefill is not free: it takes bandwidth from others. This share of its time counts.
HIDDEN_SHARE = 0.1
# A fetch asks its holder first, which answers between two steps, and may have to connect.
FETCH_START_MS = 10.0
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
    def reusable_pages(self) -> int:
        """Pages that need not be computed, if somebody has them: the last token must be, for its logits."""
        return (self.prompt_tokens - 1) // self.page_size

    @property
    def likely_pages(self) -> int:
        """Pages that hold prompt and a typical answer; its last token is never written to one."""
        return -(-(self.prompt_tokens + self.likely_tokens - 1) // self.page_size)

    @property
    def likely_tokens(self) -> int:
        """Of the answer: workers too make room for what answers usually need, not for all that one may have."""
        return min(self.max_tokens, TYPICAL_ANSWER)


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
    pull_rates: Mapping[str, float]  # bytes/s at which pages came to it, by transport

    @property
    def name(self) -> tuple[str, int]:
        return self.worker_id, self.incarnation


@dataclass(frozen=True)
class Holder:
    """Anyone whose pages can be fetched: a worker of any pool, or a page store."""

    record: WorkerRecord
    prefix_pages: int  # leading full pages of this prompt that it holds

    @property
    def host(self) -> str:
        return self.record.host

    @property
    def transports(self) -> tuple[str, ...]:
        return self.record.transports


@dataclass(frozen=True)
class Cost:
    """The formula: total = queue + fetch + compute + hand_over + decode."""

    queue_ms: float
    fetch_ms: float
    compute_ms: float
    hand_over_ms: float
    decode_ms: float

    @property
    def ttft_ms(self) -> float:
        return self.queue_ms + self.fetch_ms + self.compute_ms

    @property
    def total_ms(self) -> float:
        return self.ttft_ms + self.hand_over_ms + self.decode_ms

    def __str__(self) -> str:
        return (
            f"{self.total_ms:.1f} ms = queue {self.queue_ms:.1f} + fetch {self.fetch_ms:.1f}"
            f" + compute {self.compute_ms:.1f} + hand-over {self.hand_over_ms:.1f} + decode {self.decode_ms:.1f}"
        )


@dataclass(frozen=True)
class Placement:
    """The chosen pair, and why. A colocated worker is both. Where there is a source, prefill fetches pages from it."""

    prefill: Candidate
    decode: Candidate
    cost: Cost
    source: Holder | None = None


def choose(
    prefills: Sequence[Candidate],
    decodes: Sequence[Candidate],
    job: Job,
    now: float,
    colocated: Sequence[Candidate] = (),
    holders: Sequence[Holder] = (),
) -> Placement | None:
    """The pair, or the one worker, with the least predicted time; None where none is large enough."""
    fitting = [c for c in prefills if c.max_tokens > job.prompt_tokens]
    roomy = [c for c in decodes if c.max_tokens >= job.prompt_tokens + job.max_tokens]
    whole = [c for c in colocated if c.max_tokens >= job.prompt_tokens + job.max_tokens]
    likely = likely_sources(holders)
    sources = {c.name: best_source(c, job, now, likely) for c in (*fitting, *whole)}
    first = nsmallest(SHORTLIST, fitting, key=lambda c: prompt_ms(c, job, now, sources[c.name]))
    second = nsmallest(SHORTLIST, roomy, key=lambda c: decode_ms(c, job))
    pairs = [(p, d) for p in first for d in second]
    placements = [Placement(p, d, predict(p, d, job, now, sources[p.name]), sources[p.name]) for p, d in pairs]
    placements += [Placement(c, c, predict_colocated(c, job, now, sources[c.name]), sources[c.name]) for c in whole]
    return min(placements, key=lambda placement: placement.cost.total_ms, default=None)


def predict(prefill: Candidate, decode: Candidate, job: Job, now: float, source: Holder | None = None) -> Cost:
    """What a request would cost on this pair."""
    compute = compute_ms(prefill, job, source)
    return Cost(
        queue_ms=queue_ms(prefill, now),
        fetch_ms=fetch_ms(prefill, job, now, source),
        compute_ms=compute,
        hand_over_ms=hand_over_ms(prefill, decode, job, compute),
        decode_ms=decode_ms(decode, job),
    )


def predict_colocated(worker: Candidate, job: Job, now: float, source: Holder | None = None) -> Cost:
    """What a request would cost on this worker alone: nothing is handed over."""
    return Cost(
        queue_ms=queue_ms(worker, now),
        fetch_ms=fetch_ms(worker, job, now, source),
        compute_ms=compute_ms(worker, job, source),
        hand_over_ms=0.0,
        decode_ms=decode_ms(worker, job),
    )


def likely_sources(holders: Sequence[Holder]) -> list[Holder]:
    """Of each host who holds most, the best first: so a prefix that is everywhere takes no more time."""
    most: dict[str, Holder] = {}
    for holder in holders:
        if holder.host not in most or holder.prefix_pages > most[holder.host].prefix_pages:
            most[holder.host] = holder
    return sorted(most.values(), key=lambda holder: -holder.prefix_pages)


def best_source(worker: Candidate, job: Job, now: float, sources: Sequence[Holder]) -> Holder | None:
    """Who has pages that are moved to this worker faster than it computes them; None where nobody has."""
    near = [source for source in sources if source.host == worker.host]
    better = [source for source in (*near, *sources[:SHORTLIST]) if source.prefix_pages > worker.prefix_pages]
    return min((None, *better), key=lambda source: prompt_ms(worker, job, now, source))


def prompt_ms(worker: Candidate, job: Job, now: float, source: Holder | None) -> float:
    """Time to the first token."""
    return queue_ms(worker, now) + fetch_ms(worker, job, now, source) + compute_ms(worker, job, source)


def queue_ms(worker: Candidate, now: float) -> float:
    """Time until what is queued has been computed; what was measured has moved on since."""
    per_ms = (worker.tokens_per_s or FIRST_RATE) / 1e3
    measured = worker.queued_tokens / per_ms - 1e3 * (now - worker.measured_at)
    return max(0.0, measured) + worker.newer_tokens / per_ms


def uncached_tokens(worker: Candidate, job: Job, source: Holder | None = None) -> int:
    """Tokens that no page saves. The last token is always computed: it gives the logits."""
    pages = source.prefix_pages if source else worker.prefix_pages
    return job.prompt_tokens - min(pages, job.reusable_pages) * job.page_size


def compute_ms(worker: Candidate, job: Job, source: Holder | None = None) -> float:
    """Time to compute what is neither cached nor fetched."""
    return 1e3 * uncached_tokens(worker, job, source) / (worker.tokens_per_s or FIRST_RATE)


def fetch_ms(worker: Candidate, job: Job, now: float, source: Holder | None) -> float:
    """Time that pages from elsewhere add. They come while the worker computes what is queued before."""
    if source is None:
        return 0.0
    pages = min(source.prefix_pages, job.reusable_pages) - worker.prefix_pages
    whole = FETCH_START_MS + 1e3 * pages * job.page_bytes / _bandwidth(source, worker)
    hidden = min(whole, queue_ms(worker, now))
    return whole - hidden + HIDDEN_SHARE * hidden


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
    return _room_ms(worker, job, step) + job.likely_tokens * slowed


def _room_ms(worker: Candidate, job: Job, step: float) -> float:
    """Time until enough pages are free: held pages are taken to turn over once in a typical answer's time."""
    wanted = (worker.waiting + 1) * job.likely_pages  # those that wait are taken to be like this one
    short = max(0, wanted - worker.available_pages)
    return TYPICAL_ANSWER * step * short / max(1, worker.held_pages)


def _bandwidth(source: Candidate | Holder, reader: Candidate) -> float:
    """Of the first of the source's transports that reaches, as the reader measured it."""
    near = source.host == reader.host
    usable = (t for t in source.transports if t in BANDWIDTH and (near or t not in WITHIN_A_HOST))
    transport = next(usable, "tcp")
    return reader.pull_rates.get(transport) or BANDWIDTH[transport]

"""Placement with the live world as its arguments: the fleet's loads, one directory lookup, the clock."""

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from sys import maxsize
from time import monotonic

from kvstore.keys import PageKey, page_keys
from protos import errors
from protos.v1 import worker_pb2
from router import placement
from router.admission import Admitted, Limits
from router.fleet import Fleet, describe
from router.placement import Candidate, Holder, Job, Placement
from router.served_model import ServedModel
from router.worker_link import Name, WorkerLink

log = logging.getLogger(__name__)

LOOKUP_S = 0.25  # a directory that takes longer saves less than it costs
WAIT_STEP_S = 0.02
RECORD_AGE_S = 1.0  # how old the load of a worker's record may be when it is read
SPLIT = ("prefill", "decode")
COLOCATED = "colocated"


@dataclass(frozen=True)
class Pair:
    """Where a request goes. A colocated worker is both."""

    prefill: WorkerLink
    decode: WorkerLink
    root: PageKey  # stands before the prompt's first page
    keys: list[PageKey]  # of its full pages
    job: Job
    compute_tokens: int  # that prefill is predicted to compute
    fetch: worker_pb2.Fetch | None = None  # where prefill gets more of the pages than it has

    @property
    def is_colocated(self) -> bool:
        return self.prefill is self.decode


class Placer:
    """Finds the workers for a request: a prefill and a decode worker, or a colocated one."""

    def __init__(self, fleet: Fleet, model: ServedModel, wait_s: float) -> None:
        self._fleet = fleet
        self._model = model
        self._wait_s = wait_s

    async def place(self, request: Admitted, excluded: AbstractSet[Name], deadline: float) -> Pair:
        """The best pair, none of them in `excluded`. Waits while there is none, half of the time at most.

        Raises `NoWorkers` naming a pool that has no worker, `InvalidRequest` where no worker is large enough.
        """
        await self._wait_for_workers(request.request_id, excluded, deadline)
        identity = self._fleet.identity()
        assert identity is not None  # there are workers
        page_format = identity[1]
        root = self._model.root_key(request.tenant.secret, identity)
        keys = page_keys(root, request.token_ids, page_format.page_size)
        job = Job(request.prompt_tokens, request.sampling.max_tokens, page_format.page_size, page_format.page_bytes)
        # Before the lookup: all of this identity.
        links = {pool: self._open(pool, excluded) for pool in (*SPLIT, COLOCATED)}
        held = await self._lookup(keys)
        # Where the logits of every position are wanted, no page saves computing.
        saving, coming = ({}, []) if request.sampling.prompt_logprobs is not None else (held, keys)
        choice = placement.choose(
            _candidates(links["prefill"], saving, coming),
            _candidates(links["decode"], held),
            job,
            monotonic(),
            _candidates(links[COLOCATED], saving, coming),
            self._holders(saving, excluded),
        )
        if choice is None:
            raise self._nobody_fits(request, job, excluded)
        _log_choice(request.request_id, job, choice)
        chosen = {name: link for pool in links.values() for name, link in pool.items()}
        return Pair(
            prefill=chosen[choice.prefill.name],
            decode=chosen[choice.decode.name],
            root=root,
            keys=keys,
            job=job,
            compute_tokens=placement.uncached_tokens(choice.prefill, job, choice.source),
            fetch=_fetch(choice.source) if choice.source else None,
        )

    def has_others(self, excluded: AbstractSet[Name]) -> bool:
        """Whether a request can be placed on workers outside `excluded` now."""
        return not self._lack(excluded)

    def limits(self) -> Limits:
        """What the largest worker for each phase holds, connected or not yet; without bound while there is none."""
        records = [link.record for link in self._fleet.links.values() if not link.record.draining]
        sizes = {
            pool: max((record.max_tokens for record in records if record.pool in (pool, COLOCATED)), default=maxsize)
            for pool in SPLIT
        }
        return Limits(**sizes)

    def ttft_s(self) -> float:
        """Predicted seconds to the first token of one more request: the shortest queue of all."""
        now = monotonic()
        links = [*self._fleet.usable("prefill"), *self._fleet.usable(COLOCATED)]
        queues = [placement.queue_ms(_candidate(link, 0), now) for link in links]
        return min(queues, default=0.0) / 1e3

    @staticmethod
    def _nobody_fits(request: Admitted, job: Job, excluded: AbstractSet[Name]) -> errors.DiptychError:
        what = f"holds {job.prompt_tokens} tokens of prompt and {job.max_tokens} of answer"
        if excluded:  # those that were tried could hold it
            return errors.NoWorkers(f"no other worker {what}", request_id=request.request_id, stage="placement")
        return errors.InvalidRequest(f"no worker {what}", field="max_tokens", request_id=request.request_id)

    async def _lookup(self, keys: list[PageKey]) -> dict[str, int]:
        """How many leading pages each worker holds; nothing where the directory does not answer."""
        if not keys or not self._fleet.directory_up:
            return {}
        try:
            async with asyncio.timeout(LOOKUP_S):
                return await self._fleet.directory.lookup(keys)
        except (TimeoutError, errors.MetadataUnavailable) as error:
            log.debug("lookup failed, taken as a miss: %r", error)
            return {}

    def _holders(self, held: dict[str, int], excluded: AbstractSet[Name]) -> list[Holder]:
        records = self._fleet.holders()
        holders = [Holder(records[name], pages) for name, pages in held.items() if name in records]
        return [holder for holder in holders if (holder.record.worker_id, holder.record.incarnation) not in excluded]

    def _open(self, pool: str, excluded: AbstractSet[Name]) -> dict[Name, WorkerLink]:
        return {link.name: link for link in self._fleet.usable(pool) if link.name not in excluded}

    async def _wait_for_workers(self, request_id: str, excluded: AbstractSet[Name], deadline: float) -> None:
        started = monotonic()
        wait_s = min(self._wait_s, (deadline - started) / 2)
        while lack := self._lack(excluded):
            if monotonic() - started >= wait_s:
                raise errors.NoWorkers(f"{lack}; waited {wait_s:.1f} s", request_id=request_id, stage="placement")
            await asyncio.sleep(WAIT_STEP_S)

    def _lack(self, excluded: AbstractSet[Name]) -> str:
        """What keeps every request from being placed, in words; empty where nothing does."""
        missing = [pool for pool in SPLIT if not self._open(pool, excluded)]
        if not missing or self._open(COLOCATED, excluded):
            return ""
        known = {link.record.pool for link in self._fleet.links.values()}
        if not known:
            return "no worker is known"
        pool = COLOCATED if known == {COLOCATED} else missing[0]
        return f"no {pool} worker takes requests ({describe(self._fleet, pool)})"


def _log_choice(request_id: str, job: Job, choice: Placement) -> None:
    prefill, decode = choice.prefill, choice.decode
    log.info(
        "request %s: prefill on %s, decode on %s: %s (%d tokens of prompt; of its %d pages they hold %d and %d%s)",
        request_id,
        prefill.worker_id,
        decode.worker_id,
        choice.cost,
        job.prompt_tokens,
        job.prompt_pages,
        prefill.prefix_pages,
        decode.prefix_pages,
        f", {source.record.worker_id} {source.prefix_pages}" if (source := choice.source) else "",
    )


def _candidates(links: dict[Name, WorkerLink], held: dict[str, int], coming: Sequence[PageKey] = ()) -> list[Candidate]:
    """The workers, with what they hold of a prompt, or were asked to fill of its pages `coming`: when they get to this
    prompt that is there, and the time it takes is in their queue.
    """
    found = []
    for link in links.values():
        filled = max((_in_common(claim.keys, coming) for claim in link.claims.values()), default=0)
        found.append(_candidate(link, max(filled, held.get(link.record.holder, 0))))
    return found


def _in_common(one: Sequence[PageKey], other: Sequence[PageKey]) -> int:
    """How many pages two prompts share. A key stands for all before it, so behind one that differs all do."""
    if not one or not other or one[0] != other[0]:  # most are told apart here
        return 0
    return bisect_left(range(min(len(one), len(other))), True, key=lambda index: one[index] != other[index])


def _fetch(source: Holder) -> worker_pb2.Fetch:
    record = source.record
    pages = worker_pb2.PageSource(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        format=record.format.to_proto(),
        endpoints=[worker_pb2.Endpoint(transport=name, address=address) for name, address in record.endpoints],
    )
    return worker_pb2.Fetch(source=pages, address=record.address, pages=source.prefix_pages)


def _candidate(link: WorkerLink, prefix_pages: int) -> Candidate:
    """A worker as placement sees it. What this router asked of it after its load was measured is added."""
    record = link.record
    load, at = _load(link)
    claims = link.claims.values()
    newer = [claim for claim in claims if claim.at > at]
    return Candidate(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        host=record.host,
        transports=record.transports,
        max_tokens=record.max_tokens,
        prefix_pages=prefix_pages,
        queued_tokens=load.queued_tokens,
        newer_tokens=sum(claim.tokens for claim in newer),
        tokens_per_s=load.tokens_per_s,
        running=load.running,
        waiting=max(load.waiting, len(claims) - load.running),  # also those that are on their way into the batch
        step_ms=load.step_ms,
        available_pages=load.available_pages - sum(claim.pages for claim in newer),
        held_pages=load.held_pages,
        measured_at=at,
        pull_rates=record.pull_rates,
    )


def _load(link: WorkerLink) -> tuple[worker_pb2.WorkerLoad, float]:
    """The better of the two loads that are known: the last step's and the directory's, which is up to 1 s old."""
    step = link.step_load
    known = link.record.load
    if step is not None and (not known or step.at >= link.recorded_at - RECORD_AGE_S):
        return step.load, step.at
    load = worker_pb2.WorkerLoad(
        running=int(known.get("running", 0)),
        waiting=int(known.get("waiting", 0)),
        queued_tokens=int(known.get("queued_tokens", 0)),
        total_pages=int(known.get("total_pages", 0)),
        available_pages=int(known.get("available_pages", 0)),
        held_pages=int(known.get("held_pages", 0)),
        tokens_per_s=known.get("tokens_per_s", 0.0),
        step_ms=known.get("step_ms", 0.0),
    )
    return load, link.recorded_at

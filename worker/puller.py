"""Copies pages out of others' pools, beside the engine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from kvstore.cuda import Event
from kvstore.keys import PageKey
from kvstore.pool import PageId
from kvstore.segment_base import SegmentBase
from kvstore.transports.base import STAGE
from protos.errors import DeadlineExceeded, DiptychError
from protos.v1 import worker_pb2
from worker.lane import Lane
from worker.page_checksums import PageChecksums
from worker.pull_rates import PullRates

# Of a fetch, so much is pulled at once: enough for a transport's full rate, and small beside a long prompt's pages.
_BATCH_BYTES = 64 * 2**20
_IDLE_S = 60.0  # an unused connection is let go: to make one anew may mean to pin memory anew
_LOOK_S = 1.0  # between looks at who is gone: a mapping keeps a dead worker's memory from being given back


@dataclass(frozen=True)
class Pulled:
    """One pull's end. Where `error` is None every page's generation was checked after the copy."""

    pages: int
    bytes: int = 0
    ms: float = 0.0
    transport: str = ""
    error: DiptychError | None = None
    passed_over: str = ""  # better transports that did not work, each with its reason
    connected: bool = False  # its time is also that of the connection, which was made for it


class Fetching(Protocol):
    """What waits for a fetch. Both methods are called through `post`."""

    wanted: bool  # False: what has not been copied yet need not be

    def arrived(self, count: int) -> None:
        """So many more pages are there, from the first on: every generation was checked after the copy."""

    def ended(self, result: Pulled) -> None:
        """Nothing is written any more; `result` counts the pages that arrived."""


class Puller:
    """What ends is told through `post`, so in the engine's thread; everything else here is called from there too.

    `launched` gives an event behind everything that the engine has launched so far, or None where nothing that was
    launched can write to a page that is free by now. It is asked at each pull, in the engine's thread. With
    `checksums`, what is copied is compared with what its owner has named.
    """

    def __init__(
        self,
        segment: SegmentBase,
        transports: Sequence[str],
        post: Callable[[Callable[[], None]], None],
        launched: Callable[[], Event | None] = lambda: None,
        checksums: PageChecksums | None = None,
    ) -> None:
        self._segment = segment
        self._transports = transports
        self._post = post
        self._launched = launched
        self._checksums = checksums
        self.rates = PullRates()
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._looked = 0.0

    def pull(
        self,
        source: worker_pb2.PageSource,
        refs: Sequence[worker_pb2.PageRef],
        into: Sequence[PageId],
        timeout_s: float,
        done: Callable[[Pulled], None],
    ) -> None:
        """Copy `refs` into our pages `into`, in order after this source's earlier pulls."""
        lane = self._lane(source)
        lane.thread.submit(self._pull, lane, list(refs), list(into), timeout_s, self._launched(), done)

    def fetch(
        self, order: worker_pb2.Fetch, keys: Sequence[PageKey], into: Sequence[PageId], timeout_s: float, by: Fetching
    ) -> None:
        """Ask the holder where the leading run of these pages is, and copy that into our pages `into`, in batches.

        The time counts from now on, also while this source's earlier pulls run.
        """
        lane = self._lane(order.source)
        deadline = time.monotonic() + timeout_s
        lane.thread.submit(self._fetch, lane, order.address, list(keys), list(into), deadline, self._launched(), by)

    def close_idle(self, now: float) -> None:
        """Drop connections that were not used for a while, or whose owner is gone."""
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        for key, lane in list(self._lanes.items()):
            if lane.in_flight == 0 and (now - lane.used > _IDLE_S or lane.owner_gone()):
                del self._lanes[key]
                lane.close(wait=False)

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close(wait=True)
        self._lanes.clear()

    def _lane(self, source: worker_pb2.PageSource) -> Lane:
        key = source.worker_id, source.incarnation
        if key not in self._lanes:
            self._lanes[key] = Lane(source, self._segment, self._transports, self._checksums)
        self._lanes[key].in_flight += 1
        return self._lanes[key]

    # In the lane's thread.

    def _pull(
        self,
        lane: Lane,
        refs: list[worker_pb2.PageRef],
        into: list[PageId],
        timeout_s: float,
        after: Event | None,
        done: Callable[[Pulled], None],
    ) -> None:
        pull = _Timed(lane)
        try:
            result = pull.ended(len(refs), lane.pull(refs, into, timeout_s, after))
        except Exception as error:
            result = Pulled(len(refs), error=_typed(error))
        self._post(partial(self._finish, lane, result, done))

    def _fetch(
        self,
        lane: Lane,
        address: str,
        keys: list[PageKey],
        into: list[PageId],
        deadline: float,
        after: Event | None,
        by: Fetching,
    ) -> None:
        pull = _Timed(lane)
        batch = max(1, _BATCH_BYTES // self._segment.format.page_bytes)
        pages = moved = 0
        failed: DiptychError | None = None
        try:
            refs = lane.locate(address, keys, _left_s(deadline))
            while pages < len(refs) and by.wanted:
                part = refs[pages : pages + batch]
                moved += lane.pull(part, into[pages : pages + len(part)], _left_s(deadline), after)
                pages += len(part)
                self._post(partial(by.arrived, len(part)))
        except Exception as error:
            failed = _typed(error)
        result = pull.ended(pages, moved, failed)
        self._post(partial(self._finish, lane, result, by.ended))

    # In the engine's thread again.

    def _finish(self, lane: Lane, result: Pulled, tell: Callable[[Pulled], None]) -> None:
        lane.in_flight -= 1
        lane.used = time.monotonic()
        if result.error is None and not result.connected:
            self.rates.add(result.transport, result.bytes, result.ms / 1e3)
        tell(result)


class _Timed:
    """A pull that begins now."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._connects = not lane.connected
        self._began = time.perf_counter()

    def ended(self, pages: int, moved: int, error: DiptychError | None = None) -> Pulled:
        ms = (time.perf_counter() - self._began) * 1e3
        transport, passed_over = self._lane.transport
        return Pulled(pages, moved, ms, transport, error, passed_over, self._connects)


def _typed(error: Exception) -> DiptychError:
    if isinstance(error, DiptychError):
        return error
    return DiptychError(f"pulling pages failed: {error!r}", stage=STAGE)


def _left_s(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("the time for the pages was up", stage=STAGE)
    return left

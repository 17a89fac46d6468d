"""Copies pages out of prefill workers' pools, beside the engine."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from kvstore.cuda import Event
from kvstore.pool import PageId
from kvstore.segment_base import SegmentBase
from kvstore.transports import registry
from kvstore.transports.base import PageReader
from protos.errors import DiptychError, WorkerLost
from protos.v1 import worker_pb2

_IDLE_S = 10.0  # an unused connection is let go
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


@dataclass
class _Lane:
    """One source's connection and the thread that uses it, so that a slow source delays nobody else's pages."""

    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="pull"))
    reader: PageReader | None = None
    in_flight: int = 0
    used: float = field(default_factory=time.monotonic)

    def owner_gone(self) -> bool:
        return self.reader is not None and self.reader.owner_gone()

    def close(self, wait: bool) -> None:
        """End the thread, and the connection in it: giving back a GPU's mapping may take a while."""
        self.thread.submit(self._hang_up)
        self.thread.shutdown(wait=wait)

    def _hang_up(self) -> None:
        if self.reader is not None:
            self.reader.close()


class Puller:
    """`done` is called through `post`, so in the engine's thread; everything else here is called from there too.

    `launched` gives an event behind everything that the engine has launched so far, or None where nothing that was
    launched can write to a page that is free by now. It is asked at each pull, in the engine's thread.
    """

    def __init__(
        self,
        segment: SegmentBase,
        transports: Sequence[str],
        post: Callable[[Callable[[], None]], None],
        launched: Callable[[], Event | None] = lambda: None,
    ) -> None:
        self._segment = segment
        self._transports = transports
        self._post = post
        self._launched = launched
        self._lanes: dict[tuple[str, int], _Lane] = {}
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
        lane = self._lanes.setdefault((source.worker_id, source.incarnation), _Lane())
        lane.in_flight += 1
        pairs = [(ref.page, ref.generation) for ref in refs]
        lane.thread.submit(self._run, lane, source, pairs, list(into), timeout_s, self._launched(), done)

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

    def _run(
        self,
        lane: _Lane,
        source: worker_pb2.PageSource,
        refs: list[tuple[int, int]],
        into: list[PageId],
        timeout_s: float,
        after: Event | None,
        done: Callable[[Pulled], None],
    ) -> None:
        """In the lane's thread."""
        started = time.perf_counter()
        try:
            if lane.reader is None:
                lane.reader = registry.connect(source, self._segment, self._transports)
            moved = lane.reader.pull(refs, into, timeout_s, after)
            ms = (time.perf_counter() - started) * 1e3
            result = Pulled(len(refs), moved, ms, lane.reader.name, passed_over=lane.reader.passed_over)
        except DiptychError as error:
            result = Pulled(len(refs), error=error)
        except Exception as error:
            result = Pulled(len(refs), error=DiptychError(f"pulling pages failed: {error!r}", stage="hand_over"))
        if isinstance(result.error, WorkerLost) and lane.reader is not None:
            lane.reader.close()
            lane.reader = None  # the next pull connects anew
        self._post(partial(self._finish, lane, result, done))

    @staticmethod
    def _finish(lane: _Lane, result: Pulled, done: Callable[[Pulled], None]) -> None:
        """In the engine's thread."""
        lane.in_flight -= 1
        lane.used = time.monotonic()
        done(result)

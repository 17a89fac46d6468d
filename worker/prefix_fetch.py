"""Pages of one prompt on their way from whoever holds them."""

import logging
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from engine.scheduler import Scheduler
from engine.sequence import Sequence
from kvstore.pool import OutOfPages, PageId
from protos.v1 import worker_pb2
from worker.puller import Pulled, Puller

log = logging.getLogger(__name__)


class PrefixFetch:
    """Fills the next pages of a sequence of `scheduler.arriving` from another's pool, then lets the sequence run.

    Whatever fails, the leading run that has arrived is used and the sequence computes the rest. Once it waits no more,
    the pages that a pull may still write into are not its own any longer, and free as soon as that has returned.
    """

    def __init__(self, scheduler: Scheduler, sequence: Sequence, tell: Callable[[], None]) -> None:
        """`tell` is called when pages have arrived and are sealed."""
        self.wanted = True  # the sequence waits; the puller's thread reads it
        self.pages = 0  # that arrived
        self.ms = 0.0  # that the sequence waited
        self._scheduler = scheduler
        self._sequence = sequence
        assert sequence.credit is not None  # it was admitted
        self._credit = sequence.credit
        self._tell = tell
        self._started = self._deadline = monotonic()
        self._orphans: list[PageId] = []  # that a pull may write into and no sequence has

    def start(self, puller: Puller, order: worker_pb2.Fetch, limit_s: float) -> None:
        """Take the pages, under the sequence's credit, and ask for their bytes."""
        sequence = self._sequence
        keys = sequence.keys[len(sequence.pages) : sequence.fetchable]
        into = [self._credit.take() for _ in keys]
        for page in into:
            self._scheduler.pool.begin_fill(page)
        sequence.pages += into
        self._deadline = self._started + limit_s
        puller.fetch(order, keys, into, limit_s, self)

    def arrived(self, count: int) -> None:
        if self.wanted:
            self.pages += count
            self._scheduler.advance(self._sequence, count * self._scheduler.config.page_size)
            self._tell()

    def ended(self, result: Pulled) -> None:
        failure = f", then: {result.error}" if result.error else ""
        log.info("request %s: %d pages were fetched%s", self._sequence.request_id, self.pages, failure)
        waited = self.wanted
        self.stop()
        for page in self._orphans:
            self._scheduler.pool.abandon(page)
        if waited:
            with suppress(OutOfPages):  # so many have just become free, but a tenant's share can have become smaller
                self._credit.extend(len(self._orphans))
        self._orphans.clear()

    def expire(self, now: float) -> None:
        """Past its time the sequence goes on, as soon as there is room in place of the pages that it leaves behind."""
        if self.wanted and now >= self._deadline:
            with suppress(OutOfPages):
                self._credit.extend(len(self._sequence.pages) - self._sequence.sealed)
                self.stop()

    def stop(self) -> None:
        """The sequence waits no longer: it runs on what has arrived. May be called again."""
        if self.wanted:
            self.wanted = False
            self.ms = (monotonic() - self._started) * 1e3
            sequence = self._sequence
            self._orphans = sequence.pages[sequence.sealed :]
            del sequence.pages[sequence.sealed :]
            self._scheduler.arrived(sequence)

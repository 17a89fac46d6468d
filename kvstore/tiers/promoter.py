"""Finds pages for who asks; what is on the disk is brought to the host first."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.page_state import PageId
from kvstore.sealed_page import SealedPage
from kvstore.segment import Segment
from kvstore.tiers.ledger import Ledger
from kvstore.tiers.page_files import CorruptFile, PageFiles
from kvstore.tiers.run import Run

_READERS = 4  # files that are read at a time: a core checks about 1 GB/s
_AT_ONCE = 4 * _READERS  # pages: no more room is taken in the host before these are there
log = logging.getLogger(__name__)


class Promoter:
    """Callable from any thread."""

    def __init__(self, ledger: Ledger, segment: Segment, files: PageFiles | None) -> None:
        self._ledger = ledger
        self._segment = segment
        self._files = files
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="promote")

    def locate(self, keys: Sequence[PageKey], timeout_s: float) -> list[SealedPage]:
        """The leading run of `keys` that is in the host, or has come there within the time.

        Takes no lease: a page that leaves before it is pulled fails the fence.
        """
        end = time.monotonic() + timeout_s
        run = self._ledger.begin_run(keys)
        try:
            while room := self._ledger.room_for(run, _AT_ONCE):
                if not self._fill(run, room, end):
                    break
        finally:
            found = self._ledger.end_run(run)
        return found

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _fill(self, run: Run, room: dict[int, PageId], end: float) -> bool:
        """Fill pages of the run until `end`; whether all are. Nobody writes into any of them when this returns."""
        jobs = {i: self._threads.submit(self._read, run.lineages[i].key, page) for i, page in room.items()}
        wait(jobs.values(), max(0.0, end - time.monotonic()))
        wait([job for job in jobs.values() if not job.cancel()])
        read = {index: job.result() for index, job in jobs.items() if not job.cancelled()}
        whole = {index: lineage for index, lineage in read.items() if lineage is not None}
        for index, lineage in whole.items():
            self._ledger.promoted(run, index, lineage)
        return len(whole) == len(jobs)

    def _read(self, key: PageKey, page: PageId) -> Lineage | None:
        """Fill a page of the host. None where the disk does not have it whole; it is not kept there then."""
        assert self._files is not None
        try:
            return self._files.read(key, self._segment.pages[page].data)
        except CorruptFile as error:
            if self._ledger.off_disk(key):  # else it has left as others do
                self._ledger.count(dropped_corrupt=1)
                log.warning("a page is dropped: %s", error)
        except OSError as error:
            self._ledger.off_disk(key)
            self._ledger.count(disk_errors=1)
            log.warning("a page cannot be read: %s", error)
        with suppress(OSError):  # it is not in the ledger any more, so it is never served
            self._files.remove(key)
        return None

"""Copies one worker's pages into a store. Blocking: all calls come from one thread."""

from collections.abc import Sequence

from kvstore.keys import PageKey
from kvstore.page_state import PageId
from kvstore.sealed_page import SealedPage
from kvstore.tiers.page_tiers import PageTiers
from kvstore.transports import registry
from kvstore.transports.base import PageReader
from protos import errors
from protos.v1 import worker_pb2

_BATCH_BYTES = 64 << 20  # copied at a time
_PULL_S = 10.0  # for a batch


class Intake:
    """One connection to one life of one worker."""

    def __init__(self, tiers: PageTiers, source: worker_pb2.PageSource, transports: Sequence[str]) -> None:
        self._tiers = tiers
        self._ledger = tiers.ledger
        self._source = source
        self._transports = transports
        self._reader: PageReader | None = None
        host_pages = tiers.segment.num_pages
        self._at_once = max(1, min(host_pages // 4, _BATCH_BYTES // tiers.segment.format.page_bytes))

    def take(self, pages: Sequence[SealedPage]) -> None:
        """Copy those of the pages that the store lacks. What the worker has freed by then is passed over.

        Raises `WorkerLost` where the worker cannot be reached, and `FormatMismatch`.
        """
        for start in range(0, len(pages), self._at_once):
            self._take_batch({page.lineage.key: page for page in pages[start : start + self._at_once]})

    def close(self) -> None:
        """Let go of the worker's memory or connection."""
        if self._reader is not None:
            self._reader.close()

    def _take_batch(self, pages: dict[PageKey, SealedPage]) -> None:
        room = self._ledger.reserve(pages)
        if not room:
            return
        wanted = [pages[key] for key in room]
        try:
            self._pull(wanted, room)
        except errors.StalePage:
            self._pull_each(wanted, room)
        finally:
            for page in room.values():
                self._ledger.abandon(page)

    def _pull_each(self, wanted: Sequence[SealedPage], room: dict[PageKey, PageId]) -> None:
        for page in wanted:
            try:
                self._pull([page], room)
            except errors.StalePage:
                self._ledger.count(stale=1)

    def _pull(self, wanted: Sequence[SealedPage], room: dict[PageKey, PageId]) -> None:
        """Fill the room of these pages, which it has no more then."""
        if self._reader is None:
            self._reader = registry.connect(self._source, self._tiers.segment, self._transports)
        refs = [(page.page, page.generation) for page in wanted]
        self._reader.pull(refs, [room[page.lineage.key] for page in wanted], _PULL_S)
        for page in wanted:
            self._ledger.arrive(page.lineage, room.pop(page.lineage.key))

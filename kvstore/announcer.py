"""A worker's voice in the directory: its lease and its sealed pages, told by a thread outside the forward loop."""

import logging
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable

from kvstore.directory import DirectoryWriter, WorkerRecord
from kvstore.keys import PageKey
from protos import errors

_GATHER_S = 0.02  # what is sealed within this time goes out together
_BATCH = 512  # keys told between two looks at the lease
_MAX_WITHDRAWALS = 100_000  # that wait while the directory is away; announcements are bounded by the pool
_FIRST_BACKOFF_S = 0.1
_LEAVE_S = 2.0  # for taking pages back at the end
_STOP_S = 10.0
log = logging.getLogger(__name__)


class Announcer:
    """Keeps the lease renewed and the directory's picture of this worker's pages true.

    `sealed` and `evicted` may be called from any thread and never wait for the directory. While the directory is lost,
    it goes on trying; when it is back, every held page is announced again. `record_source` must not raise.
    """

    def __init__(
        self,
        writer: DirectoryWriter,
        record_source: Callable[[], WorkerRecord],
        ttl_s: float = 3.0,
        period_s: float = 1.0,
    ) -> None:
        self._writer = writer
        self._record_source = record_source
        self._ttl_s = ttl_s
        self._period_s = period_s
        self._record: WorkerRecord | None = None  # as last told
        self._lost = False
        self._lock = threading.Lock()
        # Page key to family. An OrderedDict gives up its first entry in O(1), which a dict does not.
        self._held: dict[PageKey, PageKey] = {}
        self._announce: OrderedDict[PageKey, PageKey] = OrderedDict()  # held, and to be told
        self._withdraw: OrderedDict[PageKey, PageKey] = OrderedDict()  # not held any more, and to be told
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)

    def start(self) -> None:
        """Register, and keep the lease from now on. Returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End the lease, take back the pages as far as two seconds allow, and wait for the thread."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)

    def sealed(self, family: PageKey, key: PageKey) -> None:
        """The pool has indexed this page."""
        with self._lock:
            self._held[key] = self._announce[key] = family
            self._withdraw.pop(key, None)
        self._wake.set()

    def evicted(self, key: PageKey) -> None:
        """The page has left the pool's index. One that was never sealed here is passed over."""
        with self._lock:
            family = self._held.pop(key, None)
            self._announce.pop(key, None)
            if family is not None and len(self._withdraw) < _MAX_WITHDRAWALS:
                self._withdraw[key] = family
        self._wake.set()

    def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._stop.is_set():
            try:
                self._renew()
                self._tell_until(time.monotonic() + self._period_s)
                backoff_s = _FIRST_BACKOFF_S
            except errors.MetadataUnavailable as error:
                if not self._lost:
                    log.warning("the directory is lost: %s", error.message)
                self._lost = True
                self._stop.wait(backoff_s)
                backoff_s = min(2 * backoff_s, self._period_s)
        self._leave()

    def _renew(self) -> None:
        self._record = self._record_source()
        # After a loss nobody knows what has arrived, or what a restarted server had on disk: tell it all.
        if self._writer.renew(self._record, self._ttl_s) or self._lost:
            with self._lock:
                self._announce = OrderedDict(self._held)
        if self._lost:
            log.warning("the directory is back: announcing %d pages", len(self._announce))
        self._lost = False

    def _tell_until(self, end: float) -> None:
        """Tell changes as they come, until the lease wants renewing."""
        while (left := end - time.monotonic()) > 0 and not self._stop.is_set():
            with self._lock:
                announce, withdraw = _first(self._announce), _first(self._withdraw)
            if announce or withdraw:
                self._tell(announce, withdraw)
            elif self._wake.wait(left):
                self._wake.clear()
                self._stop.wait(_GATHER_S)

    def _tell(self, announce: dict[PageKey, PageKey], withdraw: dict[PageKey, PageKey]) -> None:
        assert self._record is not None
        try:
            for family, keys in _by_family(announce.items()):
                self._writer.publish(self._record.holder, family, keys)
            for family, keys in _by_family(withdraw.items()):
                self._writer.withdraw(self._record.holder, family, keys)
        except errors.MetadataUnavailable:
            with self._lock:  # what was to be announced comes again with all the rest
                self._withdraw |= {key: family for key, family in withdraw.items() if key not in self._held}
            raise

    def _leave(self) -> None:
        if self._record is None:
            return
        end = time.monotonic() + _LEAVE_S
        try:
            self._writer.deregister(self._record.worker_id, self._record.incarnation)
            for family, keys in _by_family([*self._held.items(), *self._withdraw.items()]):
                if time.monotonic() < end:
                    self._writer.withdraw(self._record.holder, family, keys)
        except errors.MetadataUnavailable as error:
            log.warning("left without telling the directory: %s", error.message)


def _first(changes: OrderedDict[PageKey, PageKey]) -> dict[PageKey, PageKey]:
    return dict(changes.popitem(last=False) for _ in range(min(len(changes), _BATCH)))


def _by_family(changes: Iterable[tuple[PageKey, PageKey]]) -> Iterable[tuple[PageKey, list[PageKey]]]:
    families: defaultdict[PageKey, list[PageKey]] = defaultdict(list)
    for key, family in changes:
        families[family].append(key)
    return families.items()

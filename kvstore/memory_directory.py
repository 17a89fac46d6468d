"""The directory's twin without a server, for tests and simulation."""

import threading
import time
from collections.abc import Callable, Sequence

from kvstore.directory import ENTRY_TTL_S, DirectoryReader, DirectoryWriter, WorkerRecord, holder_name
from kvstore.keys import PageKey


class MemoryDirectory(DirectoryReader, DirectoryWriter):
    """Both sides in one object, for threads of one process. The clock gives seconds."""

    def __init__(self, entry_ttl_s: float = ENTRY_TTL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._entry_ttl_s = entry_ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._workers: dict[str, tuple[float, WorkerRecord]] = {}  # holder: end of its lease, record
        self._families: dict[PageKey, dict[PageKey, set[str]]] = {}
        self._expiry: dict[PageKey, float] = {}  # family: when it is forgotten

    async def workers(self) -> list[WorkerRecord]:
        with self._lock:
            now = self._clock()
            return [record for end, record in self._workers.values() if end > now]

    async def lookup(self, keys: Sequence[PageKey]) -> dict[str, int]:
        with self._lock:
            family = self._family(keys[0]) if keys else {}
            runs: dict[str, int] = {}
            run: set[str] = family.get(keys[0], set()) if keys else set()
            for depth, key in enumerate(keys, 1):
                run = run & family.get(key, set())
                if not run:
                    break
                runs |= dict.fromkeys(run, depth)
            if runs:
                self._expiry[keys[0]] = self._clock() + self._entry_ttl_s
            return runs

    async def ping(self) -> None:
        """It is here."""

    async def aclose(self) -> None:
        """Nothing to close."""

    def renew(self, record: WorkerRecord, ttl_s: float) -> bool:
        with self._lock:
            now = self._clock()
            self._workers = {holder: entry for holder, entry in self._workers.items() if entry[0] > now}
            known = record.holder in self._workers
            self._workers[record.holder] = (now + ttl_s, record)
            return not known

    def publish(self, holder: str, family: PageKey, keys: Sequence[PageKey]) -> None:
        with self._lock:
            entries = self._family(family)
            for key in keys:
                entries.setdefault(key, set()).add(holder)
            self._families[family] = entries
            self._expiry[family] = self._clock() + self._entry_ttl_s

    def withdraw(self, holder: str, family: PageKey, keys: Sequence[PageKey]) -> None:
        with self._lock:
            entries = self._family(family)
            for key in keys:
                holders = entries.get(key, set())
                holders.discard(holder)
                if not holders:
                    entries.pop(key, None)

    def deregister(self, worker_id: str, incarnation: int) -> None:
        with self._lock:
            self._workers.pop(holder_name(worker_id, incarnation), None)

    def close(self) -> None:
        """Nothing to close."""

    def _family(self, family: PageKey) -> dict[PageKey, set[str]]:
        if self._expiry.get(family, 0.0) <= self._clock():
            self._families.pop(family, None)
            self._expiry.pop(family, None)
        return self._families.get(family, {})

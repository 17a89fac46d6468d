"""Which page is in which tier, and what goes where next: bookkeeping under one lock, no bytes, no files, no threads."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.page_state import PageId
from kvstore.pool import Generations, OutOfPages, PagePool
from kvstore.reuse_rate import ReuseRate
from kvstore.sealed_page import SealedPage
from kvstore.tiers.counters import TierCounters
from kvstore.tiers.demotion import Demotion
from kvstore.tiers.disk_index import DiskIndex
from kvstore.tiers.open_chains import Chain, OpenChains
from kvstore.tiers.run import Run

_QUIET_S = 1.0  # a prompt to which nothing was added for so long is let go


class Ledger:
    """Both tiers of one store; callable from any thread.

    `on_arrive` hears of every page that is in a tier now, `on_leave` of every key that is in none any more; both are
    called under the lock. A page that came from a worker is let go when its prompt has not grown for a while, and then
    is due to be written to the disk, tail first: so children leave before their parents, in the host and on the disk.
    """

    def __init__(
        self,
        num_pages: int,
        generations: Generations,
        disk_pages: int,
        on_arrive: Callable[[Lineage], None],
        on_leave: Callable[[PageKey], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Room for `num_pages` in the host and `disk_pages` on the disk. The clock gives seconds."""
        self._lock = threading.Lock()
        self._pool = PagePool(num_pages, generations, self._left_host, ReuseRate(num_pages))
        self._disk = DiskIndex(disk_pages)
        self._lineages: dict[PageKey, Lineage] = {}  # of every page in a tier
        self._chains = OpenChains(_QUIET_S)
        self._due: OrderedDict[PageKey, None] = OrderedDict()  # to be written, or noted as used; in this order
        self._host_pages = 0
        self._counters = TierCounters()
        self._on_arrive = on_arrive
        self._on_leave = on_leave
        self._clock = clock

    # What there is.

    @property
    def host(self) -> tuple[int, int]:
        """Pages that there is room for, and that are there."""
        return self._pool.total_pages, self._host_pages

    @property
    def disk(self) -> tuple[int, int]:
        """As `host`."""
        return self._disk.capacity, len(self._disk)

    def counters(self) -> TierCounters:
        """As of now."""
        with self._lock:
            return replace(self._counters)

    def count(self, **more: int) -> None:
        """Add to counters."""
        with self._lock:
            for name, n in more.items():
                setattr(self._counters, name, getattr(self._counters, name) + n)

    # Pages that come from workers.

    def reserve(self, keys: Iterable[PageKey]) -> dict[PageKey, PageId]:
        """Pages for those of the keys that are in no tier, the first ones where there is not room for all.

        Each is to be filled, and then given to `arrive` or `abandon`.
        """
        with self._lock:
            missing = list(dict.fromkeys(key for key in keys if key not in self._lineages))
            return dict(zip(missing, self._room(len(missing)), strict=False))

    def arrive(self, lineage: Lineage, page: PageId) -> None:
        """The page has its bytes. One whose parent is in no tier is not kept: no prompt would ever find it."""
        with self._lock:
            if lineage.parent is not None and lineage.parent not in self._lineages:
                self._pool.abandon(page)
            elif not self._seal(page, lineage):
                self._pool.release([page])  # it came from another worker meanwhile
            else:
                self._counters.arrived += 1
                chain = self._chains.take(lineage.parent) or self._chain_to(lineage.parent)
                chain.keys.append(lineage.key)
                chain.held.append(page)
                self._chains.put(chain, self._clock())

    def abandon(self, page: PageId) -> None:
        """The page was not filled."""
        with self._lock:
            self._pool.abandon(page)

    def let_go_quiet(self) -> None:
        """Let go of prompts that do not grow any more."""
        with self._lock:
            for chain in self._chains.pop_quiet(self._clock()):
                self._let_go(chain)

    # Host to disk.

    def next_demotion(self) -> Demotion | None:
        """What is to be done for the disk next."""
        with self._lock:
            while self._due:
                key = self._due.popitem(last=False)[0]
                if key in self._disk:
                    self._disk.use(key)
                    return Demotion(self._lineages[key], None, 0)
                for page in self._pool.match([key]):
                    return Demotion(self._lineages[key], page, self._pool.generation(page))
            return None

    def make_disk_room(self) -> list[PageKey]:
        """Room for one more page; returns those that leave for it, whose files are to be removed."""
        with self._lock:
            leaving = self._disk.make_room()
            for key in leaving:
                self._left_disk(key)
            return leaving

    def on_disk(self, lineage: Lineage) -> None:
        """The page is on the disk now, for which there was room."""
        with self._lock:
            if lineage.key not in self._disk:
                self._disk.add(lineage.key)
                if lineage.key not in self._lineages:  # else what is known is of the bytes in the host
                    self._know(lineage)

    def off_disk(self, key: PageKey) -> bool:
        """What was on the disk proves to be unusable. False: it has left in the meantime anyway."""
        with self._lock:
            if key not in self._disk:
                return False
            self._disk.discard(key)
            self._left_disk(key)
            return True

    # Disk to host, for who asks.

    def begin_run(self, keys: Sequence[PageKey]) -> Run:
        """The leading run of these keys that is in a tier. It is to be ended, whatever comes."""
        with self._lock:
            run = Run()
            for key in keys:
                if key not in self._lineages:
                    break
                pages = self._pool.match([key])
                self._pool.acquire(pages)
                run.lineages.append(self._lineages[key])
                run.pages.append(pages[0] if pages else None)
            return run

    def room_for(self, run: Run, most: int) -> dict[int, PageId]:
        """Pages to be filled for the next places of the run that the host does not have, as far as there is room."""
        with self._lock:
            missing = [index for index, page in enumerate(run.pages) if page is None][:most]
            run.room = dict(zip(missing, self._room(len(missing)), strict=False))
            return dict(run.room)

    def promoted(self, run: Run, index: int, lineage: Lineage) -> None:
        """The page in this place of the run was filled from the disk, where it has this lineage."""
        with self._lock:
            page = run.room.pop(index)
            if self._seal(page, lineage):
                self._counters.promoted += 1
            else:  # another run was first
                self._pool.release([page])
                [page] = self._pool.match([lineage.key])
                self._pool.acquire([page])
            run.pages[index] = page

    def end_run(self, run: Run) -> list[SealedPage]:
        """The leading run that is in the host. It is read no more, and counts as used."""
        with self._lock:
            for page in run.room.values():
                self._pool.abandon(page)
            leading = run.pages.index(None) if None in run.pages else len(run.pages)
            there = [page for page in run.pages if page is not None]
            found = [
                SealedPage(self._lineages[lineage.key], page, self._pool.generation(page))
                for lineage, page in zip(run.lineages, there[:leading], strict=False)
            ]
            self._counters.hits += len(found)
            self._pool.release(reversed(there))
            self._expect([lineage.key for lineage in run.lineages[: len(found)]])
            return found

    # Pages for a test of transports.

    def lend(self, count: int) -> list[tuple[PageId, int]]:
        """Page and generation of pages that hold nothing, each to be given to `abandon`.

        Raises `OutOfPages` rather than take more than half of the room that pages could have.
        """
        with self._lock:
            if 2 * count > self._pool.available_pages:
                raise OutOfPages(f"{count} pages are more than half of the {self._pool.available_pages} to spare")
            return [(page, self._pool.generation(page)) for page in self._room(count)]

    # Within.

    def _room(self, n: int) -> list[PageId]:
        """Up to `n` pages to be filled; prompts that grow are let go where that makes room."""
        while self._pool.available_pages < n and self._chains:
            self._let_go(self._chains.pop_first())
        n = min(n, self._pool.available_pages)
        credit = self._pool.promise(n)
        pages = [credit.take() for _ in range(n)]
        for page in pages:
            self._pool.begin_fill(page)
        return pages

    def _seal(self, page: PageId, lineage: Lineage) -> bool:
        if not self._pool.seal(page, lineage.key):
            return False
        self._host_pages += 1
        self._know(lineage)
        return True

    def _chain_to(self, last: PageKey | None) -> Chain:
        """A prompt that begins to grow again, or a new one: all that is known of it, as a worker reads a prefix."""
        chain = Chain()
        while last is not None and last in self._lineages and len(chain.keys) < len(self._lineages):
            chain.keys.append(last)
            last = self._lineages[last].parent
        chain.keys.reverse()
        chain.held = [page for key in chain.keys for page in self._pool.match([key])]
        self._pool.acquire(chain.held)
        return chain

    def _let_go(self, chain: Chain) -> None:
        self._pool.release(reversed(chain.held))
        self._expect(chain.keys)

    def _expect(self, keys: Sequence[PageKey]) -> None:
        """These pages of one prompt are to be on the disk, the last first."""
        if self._disk.capacity:
            for key in reversed(keys):
                self._due[key] = None
                self._due.move_to_end(key)

    def _know(self, lineage: Lineage) -> None:
        is_new = lineage.key not in self._lineages
        self._lineages[lineage.key] = lineage
        if is_new:
            self._on_arrive(lineage)

    def _left_host(self, key: PageKey) -> None:
        self._host_pages -= 1
        if key not in self._disk:
            self._drop(key)

    def _left_disk(self, key: PageKey) -> None:
        if not self._pool.match([key]):
            self._drop(key)

    def _drop(self, key: PageKey) -> None:
        self._counters.dropped += 1
        self._due.pop(key, None)
        del self._lineages[key]
        self._on_leave(key)

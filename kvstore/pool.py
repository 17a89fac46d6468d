"""Who has which page: bookkeeping only, O(1) for each page, no data, no threads."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvstore.eviction import EvictionPolicy, LeastRecentlyUsed
from kvstore.keys import PageKey
from kvstore.page_state import MOVES, IllegalMove, PageId, PageState
from kvstore.quota import OutOfPages, Quota

__all__ = ["Credit", "Generations", "OutOfPages", "PageId", "PagePool"]

FREE, RESERVED, FILLING, SEALED, EVICTING = PageState  # plain names: an Enum's attribute costs a look-up each time


class Generations(Protocol):
    """One counter for each page. A list, or a segment's array that other processes read."""

    def __getitem__(self, page: int, /) -> int: ...
    def __setitem__(self, page: int, generation: int, /) -> None: ...
    def __len__(self) -> int: ...


class Credit:
    """A promise of pages that can be turned into pages one by one, and never fails while it lasts."""

    def __init__(self, pool: "PagePool", remaining: int, quota: Quota | None) -> None:
        self._pool = pool
        self._quota = quota
        self.remaining = remaining

    def take(self) -> PageId:
        """A page in RESERVED whose one writer is the caller; `IllegalMove` once nothing remains."""
        if self.remaining < 1:
            raise IllegalMove("this credit is spent or closed")
        self.remaining -= 1
        return self._pool._take(self._quota)

    def extend(self, n: int) -> None:
        """Room for `n` more pages, or `OutOfPages`."""
        self.remaining += self._pool.promise(n, self._quota).remaining

    def take_over(self, other: "Credit") -> None:
        """Let another credit of this pool pass one page on; `IllegalMove` where it has none.

        Between tenants, it is then promised to the other one: `OverQuota` where that has its share.
        """
        if other.remaining < 1:
            raise IllegalMove("the other credit is spent or closed")
        if self._quota is not other._quota:
            if self._quota is not None:
                self._quota.need(1)
                self._quota.promised += 1
            if other._quota is not None:
                other._quota.promised -= 1
        other.remaining -= 1
        self.remaining += 1

    def close(self) -> None:
        """Give back what remains. May be called again."""
        self._pool._promised -= self.remaining
        if self._quota is not None:
            self._quota.promised -= self.remaining
        self.remaining = 0


class PagePool:
    """The owner of record of `num_pages` pages.

    A page is free only when it has neither readers nor writers; they are counted apart. Each return to FREE
    raises the page's generation before the page can be handed out again. A sealed page with a key that nobody
    reads stays in the index until its room is wanted; `policy` chooses which goes first.

    `on_evict` is told every key that leaves the index. A call that does not fit a page's state raises
    `IllegalMove`. Where a `Quota` is given, the pages count against it until they are free again, and what is said of
    `OutOfPages` is also true of `OverQuota`.
    """

    def __init__(
        self,
        num_pages: int,
        generations: Generations | None = None,
        on_evict: Callable[[PageKey], None] | None = None,
        policy: EvictionPolicy | None = None,
    ) -> None:
        self._generations: Generations = [0] * num_pages if generations is None else generations
        if len(self._generations) != num_pages:
            raise ValueError(f"{len(self._generations)} generations for {num_pages} pages")
        self._on_evict = on_evict
        self._states = [FREE] * num_pages
        self._readers = [0] * num_pages
        self._writers = [0] * num_pages
        self._keys: list[PageKey | None] = [None] * num_pages  # the key under which a page is indexed
        self._index: dict[PageKey, PageId] = {}
        self._free = deque(PageId(page) for page in range(num_pages))
        self._evictable = LeastRecentlyUsed() if policy is None else policy  # sealed, indexed and unread
        self._promised = 0
        self._quotas: list[Quota | None] = [None] * num_pages  # against which a page counts
        self._quota_of: dict[PageKey, Quota] = {}

    # What there is.

    @property
    def total_pages(self) -> int:
        return len(self._states)

    @property
    def available_pages(self) -> int:
        """Pages that can still be promised: free or evictable, less those promised already."""
        return len(self._free) + len(self._evictable) - self._promised

    @property
    def held_pages(self) -> int:
        """Pages with a reader or a writer."""
        return len(self._states) - len(self._free) - len(self._evictable)

    def quota(self, root: PageKey, limit: int) -> Quota:
        """The share of the tenant whose keys come from this root, from now on `limit` pages."""
        quota = self._quota_of.setdefault(root, Quota(limit))
        quota.limit = limit
        return quota

    def available_to(self, quota: Quota | None) -> int:
        """Pages that can still be promised to a tenant."""
        return self.available_pages if quota is None else min(self.available_pages, quota.available)

    def state(self, page: PageId) -> PageState:
        return self._states[page]

    def generation(self, page: PageId) -> int:
        return int(self._generations[page])

    def readers(self, page: PageId) -> int:
        return self._readers[page]

    def writers(self, page: PageId) -> int:
        return self._writers[page]

    # Writing: promise, take, fill, seal or abandon.

    def promise(self, n: int, quota: Quota | None = None) -> Credit:
        """Room for `n` pages, or `OutOfPages`."""
        if n < 0:
            raise ValueError(f"cannot promise {n} pages")
        self._need(n, quota)
        self._promised += n
        if quota is not None:
            quota.promised += n
        return Credit(self, n, quota)

    def begin_fill(self, page: PageId) -> None:
        """RESERVED -> FILLING."""
        self._move(page, FILLING)

    def seal(self, page: PageId, key: PageKey | None) -> bool:
        """FILLING -> SEALED; the writer becomes a reader.

        The page is indexed under `key`, unless that is None or another page has it already: the first one
        wins. Returns whether it was indexed.
        """
        self._move(page, SEALED)
        self._writers[page] -= 1
        self._readers[page] += 1
        if key is None or key in self._index:
            return False
        self._index[key] = page
        self._keys[page] = key
        return True

    def abandon(self, page: PageId) -> None:
        """The writer leaves a page that it has not sealed. Nobody can read such a page, so it is free."""
        if not self._writers[page]:
            raise IllegalMove(f"page {page} is {self._states[page].name} and has no writer")
        self._writers[page] -= 1
        self._to_free(page)

    # Reading: match, acquire, release.

    def match(self, keys: Iterable[PageKey]) -> list[PageId]:
        """The pages of the leading run of `keys` that is indexed. Takes no lease."""
        pages: list[PageId] = []
        index = self._index
        for key in keys:
            page = index.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def acquire(self, pages: Sequence[PageId]) -> None:
        """One more reader for each page: all of them or, with `OutOfPages` or `IllegalMove`, none.

        `OutOfPages`: reading an evictable page takes it from those that stand behind promises.
        """
        for page in pages:
            if self._states[page] is not SEALED:
                raise IllegalMove(f"page {page} is {self._states[page].name}: only a sealed page can be read")
        unread = {page for page in pages if not self._readers[page]}
        self._need(len(unread))
        for quota, count in Counter(self._quotas[page] for page in unread).items():
            if quota is not None:
                quota.need(count)
        self._add_readers(pages)

    def release(self, pages: Iterable[PageId]) -> None:
        """One reader fewer for each page. Release a sequence's tail first: that is then evicted first."""
        for page in pages:
            left = self._readers[page] - 1
            if left < 0:
                raise IllegalMove(f"page {page} is {self._states[page].name} and has no reader")
            self._readers[page] = left
            if left == 0:
                self._unread(page)

    def admit(self, keys: Sequence[PageKey], n_total: int, quota: Quota | None = None) -> tuple[list[PageId], Credit]:
        """Reuse what is held of `keys` and get room for the rest of `n_total` pages, or `OutOfPages`.

        Returns the matched pages, each with one more reader, and a credit for the other pages. The keys are of the
        tenant whose quota it is.
        """
        if len(keys) > n_total:
            raise ValueError(f"{len(keys)} keys for {n_total} pages")
        pages = self.match(keys)
        rest = n_total - len(pages)
        self._need(rest + len({page for page in pages if not self._readers[page]}), quota)
        self._add_readers(pages)
        return pages, self.promise(rest, quota)

    def clear_cache(self) -> None:
        """Forget every key. Pages in use stay with their readers and become free after them."""
        while self._evictable:
            self._drop(self._evictable.evict())
        for page in list(self._index.values()):
            self._forget(page)

    # Within. Moves that callers ask for are checked by `_move`; what the pool takes up itself is in a state it knows.

    def _need(self, n: int, quota: Quota | None = None) -> None:
        if quota is not None:
            quota.need(n)
        if n > self.available_pages:
            raise OutOfPages(f"{n} pages are needed, {self.available_pages} of {self.total_pages} are available")

    def _move(self, page: PageId, to: PageState) -> None:
        state = self._states[page]
        if to not in MOVES[state]:
            raise IllegalMove(f"page {page} cannot go from {state.name} to {to.name}")
        self._states[page] = to

    def _take(self, quota: Quota | None) -> PageId:
        if quota is not None:
            self._count(quota)
        if not self._free:
            self._drop(self._evictable.evict())
        self._promised -= 1
        page = self._free.popleft()
        self._states[page] = RESERVED
        self._writers[page] = 1
        if quota is not None:
            self._quotas[page] = quota
        return page

    def _count(self, quota: Quota) -> None:
        """One more page for a tenant, which was promised; if need be for one that it let go."""
        if quota.pages >= quota.limit and quota.unread:
            oldest = next(iter(quota.unread))
            self._evictable.give_up(oldest)
            self._drop(oldest)
        quota.promised -= 1
        quota.pages += 1

    def _add_readers(self, pages: Sequence[PageId]) -> None:
        for page in pages:
            if not self._readers[page]:
                self._evictable.take(page)
                if (quota := self._quotas[page]) is not None:
                    del quota.unread[page]
            self._readers[page] += 1

    def _unread(self, page: PageId) -> None:
        key = self._keys[page]
        if key is None:
            self._move(page, EVICTING)
            self._to_free(page)
        else:
            self._evictable.add(page, key)
            if (quota := self._quotas[page]) is not None:
                quota.unread[page] = None

    def _drop(self, page: PageId) -> None:
        """SEALED -> EVICTING -> FREE, of a page that the policy has given up."""
        self._states[page] = EVICTING
        try:
            self._forget(page)
        finally:
            self._to_free(page)

    def _forget(self, page: PageId) -> None:
        key = self._keys[page]
        if key is not None:
            del self._index[key]
            self._keys[page] = None
            if self._on_evict is not None:
                self._on_evict(key)

    def _to_free(self, page: PageId) -> None:
        """From any state but FREE. Nobody reads the page, and its writer has left it."""
        # The generation first: whoever copies the page now must see that it is not the one that was promised.
        self._generations[page] += 1
        self._states[page] = FREE
        self._free.append(page)
        if (quota := self._quotas[page]) is not None:
            self._quotas[page] = None
            quota.pages -= 1
            quota.unread.pop(page, None)

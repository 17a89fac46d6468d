"""Evicts the page that is least likely to be read again soon for the room it takes."""

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.eviction import EvictionPolicy
from kvstore.keys import PageKey
from kvstore.page_state import PageId

_CLASSES = (1, 2, 4)  # a page belongs to the last of these that its uses reach
_REMEMBERED = 5  # evicted pages of which the uses are still known, as a multiple of the pool
_MOST_REMEMBERED = 1 << 20
_BINS = 40
_GROWTH = 1.25  # each bin of ages is so much wider than the one before
_FADE = 0.995  # of what was seen, kept at each reckoning
_EVIDENCE = 5.0  # fewer observations than this say nothing
_Counts = NDArray[np.float64]  # by bin of ages


@dataclass(slots=True)
class _Page:
    """What is known of a page, in the pool or gone from it."""

    key: PageKey
    uses: int = 0
    rank: int = 0  # which of the classes it belongs to
    let_go: int = 0  # when its last reader left, in pages let go before it


class ReuseRate(EvictionPolicy):
    """Ranks pages by the best rate of reuse that can be expected of them: reads gained for each unit of room and time.

    Every page of a pool has the same size and nearly the same cost to recompute, so the chance of reuse decides. Pages
    fall into classes by how often they were used. For each class the policy counts at which ages pages were read
    again, at which they were given up for lost, and how old those are of which neither is known yet: they have reached
    their age, and say nothing of later ones (Kaplan and Meier, 1958). A page of age a is worth max over T of P(read
    within T) / E[time until then, at most T], given that it has reached a: the index of Gittins (1979); LHD (Beckmann
    et al., NSDI 2018) estimates the like for whole lifetimes. Age is counted in pages let go meanwhile, so it scales
    with load.

    A page that was used more often goes before one that was used less only if it is older as well. A parent is used at
    least as often as its children and is never older, so children always go first.
    """

    def __init__(self, num_pages: int) -> None:
        self._queues: list[OrderedDict[PageId, _Page]] = [OrderedDict() for _ in _CLASSES]  # each oldest first
        self._held: dict[PageId, _Page] = {}  # evictable or read again
        self._gone: OrderedDict[PageKey, _Page] = OrderedDict()
        self._remembered = min(_REMEMBERED * num_pages, _MOST_REMEMBERED)
        self._clock = 0  # pages let go so far
        self._period = max(64, num_pages // 4)  # pages between two reckonings
        edges = [0.0, *(num_pages / 50 * _GROWTH**step for step in range(_BINS))]
        self._ends = edges[1:-1]  # of all bins but the last, which has none
        self._widths = np.diff(edges)
        self._reads = [[0.0] * _BINS for _ in _CLASSES]
        self._losses = [[0.0] * _BINS for _ in _CLASSES]
        # Pages that were neither read nor lost since they were let go, by the period when that was and by class.
        self._waiting_now = [0] * len(_CLASSES)
        self._waiting = {0: self._waiting_now}
        # Until there is evidence, least recently used first: this falls with age.
        self._worth = [[1.0 / (edge + num_pages) for edge in edges[:-1]] for _ in _CLASSES]
        self._by_rank = list(zip(self._queues, self._worth, strict=True))

    def add(self, page: PageId, key: PageKey) -> None:
        known = self._held.get(page)
        if known is None or known.key != key:
            known = self._held[page] = self._remember(key)
        known.uses += 1
        known.rank = rank = bisect_right(_CLASSES, known.uses) - 1
        known.let_go = self._clock
        self._queues[rank][page] = known
        self._waiting_now[rank] += 1
        self._clock += 1
        if self._clock % self._period == 0:
            self._reckon()
            self._waiting_now = self._waiting[self._clock // self._period] = [0] * len(_CLASSES)

    def take(self, page: PageId) -> None:
        known = self._held[page]
        del self._queues[known.rank][page]
        self._note(self._reads, known)

    def evict(self) -> PageId:
        # The oldest page of each class may go, if it is older than those of the classes before: the one worth least.
        clock, ends = self._clock, self._ends
        oldest, least, chosen = clock, math.inf, PageId(-1)
        for queue, worth in self._by_rank:
            for page in queue:
                let_go = queue[page].let_go
                if let_go < oldest:
                    oldest = let_go
                    value = worth[bisect_right(ends, clock - let_go)]
                    if value <= least:
                        least, chosen = value, page
                break  # only its first one
        self.give_up(chosen)
        return chosen

    def give_up(self, page: PageId) -> None:
        known = self._held.pop(page)
        del self._queues[known.rank][page]
        self._gone[known.key] = known
        if len(self._gone) > self._remembered:
            self._note(self._losses, self._gone.popitem(last=False)[1])

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def __iter__(self) -> Iterator[PageId]:
        for queue in self._queues:
            yield from queue

    def _remember(self, key: PageKey) -> _Page:
        """What is known of a key that comes back, or of a new one."""
        known = self._gone.pop(key, None)
        if known is None:
            return _Page(key)
        self._note(self._reads, known)  # it would have been read, had it stayed
        return known

    def _note(self, counts: list[list[float]], known: _Page) -> None:
        rank, let_go = known.rank, known.let_go
        counts[rank][bisect_right(self._ends, self._clock - let_go)] += 1.0
        self._waiting[let_go // self._period][rank] -= 1

    def _reckon(self) -> None:
        """Work out anew what pages are worth, and let what was seen fade."""
        classes = zip(self._reads, self._losses, self._count_waiting(), self._worth, strict=True)
        for reads, losses, waiting, worth in classes:
            if sum(reads) + sum(losses) >= _EVIDENCE:
                worth[:] = self._best_rates(np.array(reads), np.array(losses), np.array(waiting)).tolist()
            reads[:] = [seen * _FADE for seen in reads]
            losses[:] = [seen * _FADE for seen in losses]

    def _count_waiting(self) -> list[list[int]]:
        """Pages whose fate is not known yet: for each class, how many of each age."""
        ages = [[0] * _BINS for _ in _CLASSES]
        for period in [period for period, counts in self._waiting.items() if not any(counts)]:
            del self._waiting[period]
        for period, counts in self._waiting.items():
            bin_ = bisect_right(self._ends, self._clock - (period + 0.5) * self._period)
            for rank, count in enumerate(counts):
                ages[rank][bin_] += count
        return ages

    def _best_rates(self, reads: _Counts, losses: _Counts, waiting: _Counts) -> _Counts:
        """What a page of each age is worth: nothing, if hardly any was seen to be so old."""
        ended = reads + losses + waiting
        alive = ended[::-1].cumsum()[::-1]  # that reached each age
        hits = np.append(0.0, reads.cumsum())
        room = np.append(0.0, ((alive - ended / 2) * self._widths).cumsum())
        # From each age (a row) to each later one (a column): reads gained over room and time spent.
        gained, spent = hits[1:] - hits[:-1, None], room[1:] - room[:-1, None]
        rates = np.divide(gained, spent, out=np.zeros_like(spent), where=spent > 0)
        return np.where(alive >= _EVIDENCE, rates.max(axis=1), 0.0)

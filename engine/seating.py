"""Which row of the resident batch each sequence sits in. Pure bookkeeping: no torch."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from engine.sequence import Sequence

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192)  # above 128 in steps of 64


def graph_sizes(rows: int) -> list[int]:
    """The numbers of rows for which there is a graph, ascending; the last is `rows`."""
    sizes = [*_SIZES, *range(256, rows, 64)]
    return [size for size in sizes if size < rows] + [rows]


@dataclass(frozen=True)
class Changes:
    """What a step changes: rows that nobody sits in any more, and rows whose content goes to another row."""

    emptied: list[int]
    moved: list[tuple[int, int]]  # (from, to)


class Seating:
    """Rows 0, 1, ... of a batch. Sequences take the lowest free row, and move down only where a smaller graph then
    holds them all.
    """

    def __init__(self, rows: int) -> None:
        self.sizes = graph_sizes(rows)
        self._row_of: dict[Sequence, int] = {}
        self._free = list(range(rows))  # a heap

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._row_of

    def row(self, sequence: Sequence) -> int:
        return self._row_of[sequence]

    @property
    def size(self) -> int:
        """Of the smallest graph that holds every seated row."""
        return self._size_for(max(self._row_of.values(), default=-1) + 1)

    def seat(self, wanted: Iterable[Sequence]) -> Changes:
        """From now on these sequences sit, and no others; who sits already keeps its content."""
        wanted = dict.fromkeys(wanted)
        left = [sequence for sequence in self._row_of if sequence not in wanted]
        freed = [self.leave(sequence) for sequence in left]
        for sequence in wanted:
            if sequence not in self._row_of:
                self._row_of[sequence] = heapq.heappop(self._free)
        moved = self._compact()
        taken = set(self._row_of.values())
        freed += [source for source, _ in moved]
        return Changes([row for row in freed if row not in taken], moved)

    def leave(self, sequence: Sequence) -> int:
        """Free the sequence's row and return it."""
        row = self._row_of.pop(sequence)
        heapq.heappush(self._free, row)
        return row

    def _compact(self) -> list[tuple[int, int]]:
        fits = self._size_for(len(self._row_of))
        if self.size == fits:
            return []
        high = [(row, sequence) for sequence, row in self._row_of.items() if row >= fits]
        return [(row, self._move(sequence, row)) for row, sequence in high]

    def _move(self, sequence: Sequence, row: int) -> int:
        to = self._row_of[sequence] = heapq.heapreplace(self._free, row)
        return to

    def _size_for(self, rows: int) -> int:
        return next(size for size in self.sizes if size >= rows)

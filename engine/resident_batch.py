"""The decode rows of an engine, kept on the device from step to step."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.upload import upload


class ResidentBatch:
    """What a decode step needs to know of each row. The step itself moves every row on to its next token; the host
    sends only what the step cannot know: rows that are filled or emptied, and new pages. `flush` sends it in one copy.

    token_ids    [rows] int64: the newest token, which the next step computes
    context_lens [rows] int32: tokens to attend to, that one included; 0 marks a row without a sequence
    page_table   [rows, columns] int32

    All are views of one buffer of 32-bit cells, so that any change is a number and its place. A token id has two cells:
    the lower half, which is written, and the upper one, which stays 0.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._contexts, self._table, self._columns = 2 * rows, 3 * rows, columns  # the first places, and a row's width
        self._cells = torch.zeros(rows * (3 + columns), dtype=torch.int32, device=device)
        self.token_ids = self._cells[: self._contexts].view(torch.int64)
        self.context_lens = self._cells[self._contexts : self._table]
        self.page_table = self._cells[self._table :].view(rows, columns)
        self._pages = [0] * rows  # of each row, how many are in its table
        self._writes: dict[int, int] = {}  # place to number

    def fill(self, row: int, token_id: int, context_len: int, pages: Sequence[int]) -> None:
        """Seat a sequence: its newest token, and the context that this token is the last of."""
        self._writes[2 * row] = token_id
        self._writes[self._contexts + row] = context_len
        self._pages[row] = 0
        self.grow(row, pages)

    def grow(self, row: int, pages: Sequence[int]) -> None:
        """Make `pages` the row's pages; those that it has already are the first of them."""
        known = self._pages[row]
        if known == len(pages):
            return
        self._writes.update(enumerate(pages[known:], self._table + row * self._columns + known))
        self._pages[row] = len(pages)

    def empty(self, row: int) -> None:
        self._writes[self._contexts + row] = 0

    def move(self, moves: Sequence[tuple[int, int]], rows: Tensor) -> None:
        """Give the contents of rows to others, at once: (from, to), and the same on the device, [2, n] int64."""
        for field in (self.token_ids, self.context_lens, self.page_table):
            field[rows[1]] = field[rows[0]]  # all of it is read before any of it is written
        for source, to in moves:
            self._pages[to] = self._pages[source]

    def next_tokens(self, rows: Tensor, token_ids: Tensor, context_lens: Tensor) -> None:
        """Give rows [n] int64 their newest tokens [n] int64, from the device, and the contexts [n] int32 they end."""
        self.token_ids[rows] = token_ids
        self.context_lens[rows] = context_lens

    def flush(self) -> None:
        """Send what has changed, in the order of the current stream."""
        if self._writes:
            places, numbers = upload([_array(self._writes), _array(self._writes.values())], self._cells.device)
            self._cells[places] = numbers.int()
            self._writes.clear()


def _array(numbers: Iterable[int]) -> npt.NDArray[Any]:
    return np.fromiter(numbers, np.int64)

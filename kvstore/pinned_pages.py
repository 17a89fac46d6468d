"""Pages in host memory that GPUs read and write at the full rate of their link."""

import math
import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.cuda import PinnedRange
from kvstore.page_state import PageId

_PIECE_BYTES = 16 << 20
_PAUSE_S = 2e-4
_ALIGNMENT = 4096  # memory is pinned in the system's pages: two pieces must not share one


class PinnedPages:
    """Pins the pages of a host segment in pieces, each when a page of it is first copied, until `close`.

    Not the whole pool at once: a GiB takes 50 to 100 ms, and while a piece is pinned, no other thread of the process
    can launch anything on the GPU. Pieces of 16 MiB, and a pause after each, hold a launch up for 1.2 ms (of 64 MiB
    for 3.9 ms). Several threads may ask for addresses; nothing is copied any more when it is closed.
    """

    def __init__(self, pages: NDArray[np.uint8]) -> None:
        """`pages` is uint8 [num_pages, page_bytes]."""
        self._pages: NDArray[np.uint8] | None = pages
        page_bytes = pages.shape[1]
        aligned = _ALIGNMENT // math.gcd(_ALIGNMENT, page_bytes)
        self._each = -(-_PIECE_BYTES // page_bytes // aligned) * aligned  # pages of one piece
        self._pieces: dict[int, PinnedRange] = {}
        self._lock = threading.Lock()

    def addresses(self, wanted: Sequence[PageId], device: int) -> list[int]:
        """Where these pages are, pinned. Raises `CudaError` where they cannot be."""
        with self._lock:
            if self._pages is None:
                raise ValueError("the segment is closed")
            for piece in sorted({page // self._each for page in wanted} - self._pieces.keys()):
                self._pieces[piece] = self._pin(self._pages[piece * self._each : (piece + 1) * self._each], device)
                time.sleep(_PAUSE_S)
            base, size = self._pages.ctypes.data, self._pages.shape[1]
        return [base + page * size for page in wanted]

    def close(self) -> None:
        """Before the memory is unmapped. May be called again."""
        with self._lock:
            for piece in self._pieces.values():
                piece.close()
                time.sleep(_PAUSE_S)
            self._pieces.clear()
            self._pages = None

    @staticmethod
    def _pin(pages: NDArray[np.uint8], device: int) -> PinnedRange:
        return PinnedRange(pages.ctypes.data, pages.nbytes, device, read_only=not pages.flags.writeable)

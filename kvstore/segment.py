"""A worker's pages in anonymous shared memory, which other processes of the host can open to read."""

import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.page_format import PageFormat
from kvstore.page_state import PageId
from kvstore.pinned_pages import PinnedPages
from kvstore.segment_base import SegmentBase
from kvstore.segment_header import STAGE, SegmentHeader
from protos import errors


class Segment(SegmentBase):
    """`header | int64 generations | pages` in host memory.

    The owner makes one with `create`. Another process of the host maps it with `open`, for reading only.
    """

    def __init__(self, header: SegmentHeader, memory: mmap.mmap, address: str, fd: int, owner: bool) -> None:
        if header.on_gpu:
            raise errors.WorkerLost(f"the pages of {address} are on a GPU", stage=STAGE)
        super().__init__(header, memory, address, fd, owner)
        self._pages: NDArray[np.uint8] | None = np.frombuffer(
            memory, np.uint8, header.num_pages * header.format.page_bytes, header.pages_at
        ).reshape(header.num_pages, header.format.page_bytes)
        self._pinned = PinnedPages(self._pages)

    @classmethod
    def create(cls, format: PageFormat, num_pages: int, incarnation: int) -> "Segment":  # noqa: A002
        """A new segment of zeros. Memory is taken as pages are first written."""
        return cls._create(SegmentHeader(format, num_pages, incarnation))

    @property
    def pages(self) -> NDArray[np.uint8]:
        """[num_pages, page_bytes]"""
        if self._pages is None:
            raise ValueError("the segment is closed")
        return self._pages

    def addresses(self, pages: Sequence[PageId], device: int) -> list[int]:
        """Where these pages are for a copy engine. They are pinned from then on; `CudaError` where they cannot be."""
        return self._pinned.addresses(pages, device)

    def close(self) -> None:
        self._pinned.close()
        self._pages = None
        super().close()

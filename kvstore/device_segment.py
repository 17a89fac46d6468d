"""A worker's pages in a GPU's memory, which other processes of the host can map through CUDA IPC."""

from collections.abc import Sequence

from kvstore.cuda import DeviceMemory
from kvstore.page_format import PageFormat
from kvstore.page_state import PageId
from kvstore.segment_base import SegmentBase
from kvstore.segment_header import SegmentHeader


class DeviceSegment(SegmentBase):
    """`header | int64 generations` in host memory, where readers compare them, and the pages on `cuda:<device>`.

    Only the owner makes one; a reader opens the host part and maps the header's `ipc_handle`.
    """

    _pages: DeviceMemory | None

    @classmethod
    def create(cls, format: PageFormat, num_pages: int, incarnation: int, device: int = 0) -> "DeviceSegment":  # noqa: A002
        """A new segment of zeros. All of its memory is taken at once; `CudaError` where there is not so much."""
        pages = DeviceMemory((num_pages, format.page_bytes), device)
        segment = cls._create(SegmentHeader(format, num_pages, incarnation, pages.export(), pages.gpu()))
        segment._pages = pages
        return segment

    @property
    def pages(self) -> DeviceMemory:
        """[num_pages, page_bytes] on the device."""
        if self._pages is None:
            raise ValueError("the segment is closed")
        return self._pages

    @property
    def device(self) -> int:
        return self.pages.device

    def addresses(self, pages: Sequence[PageId], device: int) -> list[int]:
        """Where these pages are for a copy engine."""
        base, size = self.pages.pointer, self.format.page_bytes
        return [base + page * size for page in pages]

    def close(self) -> None:
        """Let go of the memory; tensors made from `pages` keep it while they live. May be called again."""
        self._pages = None
        super().close()

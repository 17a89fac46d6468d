"""What all readers share whose pages move by a GPU's copy engines."""

from abc import abstractmethod
from collections.abc import Sequence

from kvstore import cuda
from kvstore.device_segment import DeviceSegment
from kvstore.pool import PageId
from kvstore.segment import Segment
from kvstore.segment_base import SegmentBase
from kvstore.transports.base import STAGE, PageReader, PageRef
from protos import errors


class CopyEngineReader(PageReader):
    """Copies out of an owner's memory that is mapped here. A pull is a few batches of whole pages.

    It runs at the rate of one contiguous copy and takes no multiprocessor from the steps that run meanwhile.
    """

    def __init__(self, segment: Segment | DeviceSegment, owner: SegmentBase, device: int) -> None:
        """`owner` is closed with the reader. `device` copies."""
        super().__init__(segment)
        self._local = segment
        self._owner = owner
        self._device = device
        self._stream = cuda.CopyStream(device)

    @abstractmethod
    def _sources(self, pages: Sequence[PageId]) -> list[int]:
        """Where the owner's pages are."""

    def owner_gone(self) -> bool:
        return not self._owner.owner_alive()

    def _copy(
        self, refs: Sequence[PageRef], into: Sequence[PageId], timeout_s: float, after: cuda.Event | None
    ) -> list[int]:
        self._check_owner()
        if timeout_s <= 0:
            raise errors.WorkerLost(f"{len(refs)} pages were not copied in {timeout_s} s", stage=STAGE)
        pages = [PageId(page) for page, _ in refs]
        if pages and max(pages) >= self._owner.num_pages:
            raise errors.StalePage(f"the owner's pool has no page {max(pages)}", stage=STAGE)
        sources, targets = self._sources(pages), self._local.addresses(into, self._device)
        # Returns only when nothing writes into the local pages any more, as the caller may free them if this fails.
        # So copies that have begun are waited for, however long it takes: they cannot be called back.
        self._stream.copy(sources, targets, self._segment.format.page_bytes, after)
        found: list[int] = self._owner.generations[pages].tolist()
        self._check_owner()
        return found

    def _check_owner(self) -> None:
        # A dead owner's pages could still be read, but this mapping keeps its memory from being given back.
        if self.owner_gone():
            raise errors.WorkerLost(f"the owner of {self._owner.address} is gone", stage=STAGE)

    def close(self) -> None:
        self._stream.close()
        self._owner.close()

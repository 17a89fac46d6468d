"""Pages through shared memory: for two processes of one host."""

import time
from collections.abc import Sequence

from kvstore.cuda import Event
from kvstore.device_segment import DeviceSegment
from kvstore.pool import PageId
from kvstore.segment import Segment
from kvstore.segment_base import SegmentBase
from kvstore.transports.base import STAGE, PageReader, PageRef, PageServer
from kvstore.transports.shm_to_gpu import ShmToGpuReader
from protos import errors
from protos.v1 import worker_pb2

NAME = "shm"


def cannot_serve(segment: SegmentBase) -> str:
    """Why pages of this pool cannot be read so; empty where they can."""
    return "" if isinstance(segment, Segment) else "this worker's pages are on a GPU"


def connect(address: str, incarnation: int, segment: SegmentBase) -> PageReader:
    """The reader that suits the local pool. Raises what readers do."""
    if isinstance(segment, DeviceSegment):
        return ShmToGpuReader(address, incarnation, segment)
    assert isinstance(segment, Segment)
    return ShmReader(address, incarnation, segment)


class ShmServer(PageServer):
    """Nothing runs: a segment's address is all that a reader needs."""

    def __init__(self, segment: SegmentBase, host: str) -> None:
        self.endpoint = worker_pb2.Endpoint(transport=NAME, address=segment.address)

    def close(self) -> None:
        """The segment's owner closes the segment."""


class ShmReader(PageReader):
    """Maps the owner's segment, read-only, and copies out of it into host memory.

    Raises `WorkerLost` where that life cannot be reached from here, and `FormatMismatch`.
    """

    name = NAME

    def __init__(self, address: str, incarnation: int, segment: Segment) -> None:
        super().__init__(segment)
        self._local = segment
        self._owner = Segment.open(address, incarnation, segment.format)

    def owner_gone(self) -> bool:
        return not self._owner.owner_alive()

    def _copy(
        self, refs: Sequence[PageRef], into: Sequence[PageId], timeout_s: float, after: Event | None
    ) -> list[int]:
        deadline = time.monotonic() + timeout_s
        self._check_owner()
        for (page, _), local in zip(refs, into, strict=True):
            if page >= self._owner.num_pages:
                raise errors.StalePage(f"the owner's pool has no page {page}", stage=STAGE)
            if time.monotonic() >= deadline:
                raise errors.WorkerLost(f"{len(refs)} pages were not copied in {timeout_s} s", stage=STAGE)
            self._copy_page(page, local)
        found = [int(self._owner.generations[page]) for page, _ in refs]
        self._check_owner()
        return found

    def _copy_page(self, page: int, local: PageId) -> None:
        self._local.pages[local] = self._owner.pages[page]

    def _check_owner(self) -> None:
        # A dead owner's pages could still be read, but this mapping would keep its memory from being given back.
        if self.owner_gone():
            raise errors.WorkerLost(f"the owner of {self._owner.address} is gone", stage=STAGE)

    def close(self) -> None:
        self._owner.close()

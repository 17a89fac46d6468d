"""Pages from GPU to GPU of one host, or within one: the reader maps the owner's memory and copies out of it.

A pull is one batch of whole pages on the copy engines. It runs at the rate of one contiguous copy and takes no
multiprocessor from the steps that run meanwhile.
"""

from collections.abc import Sequence

from kvstore import cuda
from kvstore.device_segment import DeviceSegment
from kvstore.pool import PageId
from kvstore.segment_base import SegmentBase
from kvstore.transports.base import STAGE, PageReader, PageRef, PageServer
from protos import errors
from protos.v1 import worker_pb2

NAME = "cuda_ipc"


def unavailable(segment: SegmentBase) -> str:
    """Why pages of this worker cannot move so; empty where they can."""
    return cuda.unavailable() if isinstance(segment, DeviceSegment) else "this worker's pages are in host memory"


class CudaIpcServer(PageServer):
    """Nothing runs: the handle of the pages' memory is in the segment's header."""

    def __init__(self, segment: SegmentBase, host: str) -> None:
        self.endpoint = worker_pb2.Endpoint(transport=NAME, address=segment.address)

    def close(self) -> None:
        """The segment's owner closes the segment."""


class CudaIpcReader(PageReader):
    """Maps the owner's GPU memory for the local segment's device, whether or not this process sees the owner's GPU.

    Raises `WorkerLost` where that life cannot be reached from here, and `FormatMismatch`.
    """

    name = NAME

    def __init__(self, address: str, incarnation: int, segment: SegmentBase) -> None:
        super().__init__(segment)
        assert isinstance(segment, DeviceSegment)  # by `unavailable`
        self._local = segment
        self._owner = SegmentBase.open(address, incarnation, segment.format)
        try:
            if not self._owner.header.on_gpu:
                raise errors.WorkerLost(f"the pages of {address} are in host memory", stage=STAGE)
            size = self._owner.num_pages * segment.format.page_bytes
            self._mapped = cuda.MappedMemory(self._owner.header.ipc_handle, size, segment.device)
        except errors.WorkerLost:
            self._owner.close()
            raise
        self._stream = cuda.CopyStream(segment.device)

    def owner_gone(self) -> bool:
        return not self._owner.owner_alive()

    def _copy(
        self, refs: Sequence[PageRef], into: Sequence[PageId], timeout_s: float, after: cuda.Event | None
    ) -> list[int]:
        self._check_owner()
        if timeout_s <= 0:
            raise errors.WorkerLost(f"{len(refs)} pages were not copied in {timeout_s} s", stage=STAGE)
        pages = [page for page, _ in refs]
        if pages and max(pages) >= self._owner.num_pages:
            raise errors.StalePage(f"the owner's pool has no page {max(pages)}", stage=STAGE)
        size = self._segment.format.page_bytes
        sources = [self._mapped.pointer + page * size for page in pages]
        base = self._local.pages.pointer
        # Returns only when nothing writes into the local pages any more, as the caller may free them if this fails.
        # So a batch that has begun is waited for, however long it takes: it cannot be called back.
        self._stream.copy(sources, [base + page * size for page in into], size, after)
        found: list[int] = self._owner.generations[pages].tolist()
        self._check_owner()
        return found

    def _check_owner(self) -> None:
        # A dead owner's pages could still be read, but this mapping keeps its memory from being given back.
        if self.owner_gone():
            raise errors.WorkerLost(f"the owner of {self._owner.address} is gone", stage=STAGE)

    def close(self) -> None:
        self._mapped.close()
        self._stream.close()
        self._owner.close()

"""Pages out of a GPU's memory within one host: the reader maps the owner's memory, into its own GPU's or host's."""

from collections.abc import Sequence

from kvstore import cuda
from kvstore.device_segment import DeviceSegment
from kvstore.pool import PageId
from kvstore.segment import Segment
from kvstore.segment_base import SegmentBase
from kvstore.transports.base import STAGE, PageServer
from kvstore.transports.copy_engine import CopyEngineReader
from protos import errors
from protos.v1 import worker_pb2

NAME = "cuda_ipc"


def cannot_serve(segment: SegmentBase) -> str:
    """Why pages of this pool cannot be read so; empty where they can."""
    return "" if isinstance(segment, DeviceSegment) else "this worker's pages are in host memory"


def cannot_fill(segment: SegmentBase) -> str:
    """Why pages cannot come into this pool so; empty where they can."""
    return cuda.unavailable()


class CudaIpcServer(PageServer):
    """Nothing runs: the handle of the pages' memory is in the segment's header."""

    def __init__(self, segment: SegmentBase, host: str) -> None:
        self.endpoint = worker_pb2.Endpoint(transport=NAME, address=segment.address)

    def close(self) -> None:
        """The segment's owner closes the segment."""


class CudaIpcReader(CopyEngineReader):
    """Maps the owner's GPU memory for the device that copies, whether or not this process sees the owner's GPU.

    That is the local pool's own; for a pool in host memory the owner's, so that pages cross one link only. Raises
    `WorkerLost` where that life cannot be reached from here, and `FormatMismatch`.
    """

    name = NAME

    def __init__(self, address: str, incarnation: int, segment: SegmentBase) -> None:
        assert isinstance(segment, Segment | DeviceSegment)
        owner = SegmentBase.open(address, incarnation, segment.format)
        try:
            if not owner.header.on_gpu:
                raise errors.WorkerLost(f"the pages of {address} are in host memory", stage=STAGE)
            device = segment.device if isinstance(segment, DeviceSegment) else cuda.device_of(owner.header.gpu)
            self._mapped = cuda.MappedMemory(owner.header.ipc_handle, owner.num_pages * owner.format.page_bytes, device)
        except errors.DiptychError:
            owner.close()
            raise
        super().__init__(segment, owner, device)

    def _sources(self, pages: Sequence[PageId]) -> list[int]:
        size = self._segment.format.page_bytes
        return [self._mapped.pointer + page * size for page in pages]

    def close(self) -> None:
        self._mapped.close()
        super().close()

"""Pages through shared memory into a GPU: its copy engines read the owner's pages where they are."""

from collections.abc import Sequence

from kvstore import cuda
from kvstore.device_segment import DeviceSegment
from kvstore.pool import PageId
from kvstore.segment import Segment
from kvstore.transports.base import STAGE
from kvstore.transports.copy_engine import CopyEngineReader
from protos import errors


class ShmToGpuReader(CopyEngineReader):
    """Maps the owner's segment, read-only, and pins what is copied of it.

    Raises `WorkerLost` where that life cannot be reached from here or its memory cannot be pinned, and
    `FormatMismatch`.
    """

    name = "shm"

    def __init__(self, address: str, incarnation: int, segment: DeviceSegment) -> None:
        self._pages = Segment.open(address, incarnation, segment.format)
        try:
            self._pages.addresses([PageId(0)], segment.device)
        except cuda.CudaError as error:
            self._pages.close()
            raise errors.WorkerLost(f"cuda:{segment.device} cannot read it: {error.message}", stage=STAGE) from error
        super().__init__(segment, self._pages, segment.device)

    def _sources(self, pages: Sequence[PageId]) -> list[int]:
        return self._pages.addresses(pages, self._device)

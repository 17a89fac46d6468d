"""Pages through TCP connections: between any two hosts. A GPU's pages pass through pinned host memory."""

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import pairwise

from kvstore.cuda import Event
from kvstore.pool import PageId
from kvstore.segment_base import SegmentBase
from kvstore.transports.base import STAGE, PageReader, PageRef
from kvstore.transports.tcp_server import NAME, TcpServer
from kvstore.transports.tcp_stream import CONNECT_S, TcpStream
from protos import errors

__all__ = ["NAME", "TcpReader", "TcpServer"]

STREAMS = 4  # a core copies a few GB/s, and many networks give one stream less than the link
_STREAM_BYTES = 1 << 20  # less than this is not worth a stream of its own


class TcpReader(PageReader):
    """Keeps up to `STREAMS` connections to an owner and divides every pull's pages between them.

    Raises `WorkerLost` where nobody answers at `address`, or another life does.
    """

    name = NAME

    def __init__(self, address: str, incarnation: int, segment: SegmentBase) -> None:
        super().__init__(segment)
        self._address = address
        self._incarnation = incarnation
        self._threads = ThreadPoolExecutor(STREAMS, thread_name_prefix="tcp-pull")
        self._streams = [TcpStream(address, incarnation, segment)]
        try:
            self._streams[0].copy([], [], time.monotonic() + CONNECT_S, None)
        except errors.DiptychError:
            self.close()
            raise

    def _copy(
        self, refs: Sequence[PageRef], into: Sequence[PageId], timeout_s: float, after: Event | None
    ) -> list[int]:
        if not self._streams:
            raise errors.WorkerLost(f"the connection to {self._address} is closed", stage=STAGE)
        deadline = time.monotonic() + timeout_s
        streams = self._streams_for(len(refs))
        if len(streams) == 1:
            return streams[0].copy(refs, into, deadline, after)
        bounds = [i * len(refs) // len(streams) for i in range(len(streams) + 1)]
        copies = [
            self._threads.submit(stream.copy, refs[start:end], into[start:end], deadline, after)
            for stream, (start, end) in zip(streams, pairwise(bounds), strict=True)
        ]
        done, _ = wait(copies, return_when=FIRST_EXCEPTION)
        if any(isinstance(copy.exception(), errors.WorkerLost) for copy in done):
            for stream in streams:
                stream.wake()
        wait(copies)  # the caller may free the local pages when this has raised: nobody may write into them any more
        found: list[int] = []
        for copy in copies:
            found += copy.result()
        return found

    def _streams_for(self, pages: int) -> list[TcpStream]:
        worth = -(-pages * self._segment.format.page_bytes // _STREAM_BYTES)
        wanted = max(1, min(STREAMS, pages, worth))
        while len(self._streams) < wanted:
            self._streams.append(TcpStream(self._address, self._incarnation, self._segment))
        return self._streams[:wanted]

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self._streams.clear()
        self._threads.shutdown()

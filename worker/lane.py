"""The way to one holder's pages."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

from kvstore.cuda import Event
from kvstore.keys import PageKey, pack_keys
from kvstore.pool import PageId
from kvstore.segment_base import SegmentBase
from kvstore.transports import registry
from kvstore.transports.base import STAGE, PageReader
from protos.errors import DiptychError, WorkerLost
from protos.v1 import worker_pb2, worker_pb2_grpc
from rpc import status
from rpc.server import CHANNEL_OPTIONS
from worker.page_checksums import PageChecksums


class Lane:
    """One source's connections and the thread that uses them, so that a slow source delays nobody else's pages.

    `pull` and `locate` block: they are for `thread`.
    """

    def __init__(
        self,
        source: worker_pb2.PageSource,
        segment: SegmentBase,
        transports: Sequence[str],
        checksums: PageChecksums | None,
    ) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="pull")
        self.in_flight = 0
        self.used = time.monotonic()
        self._source = source
        self._segment = segment
        self._transports = transports
        self._checksums = checksums
        self._reader: PageReader | None = None
        self._channel: grpc.Channel | None = None  # to the source's PageHolder

    @property
    def connected(self) -> bool:
        return self._reader is not None

    @property
    def transport(self) -> tuple[str, str]:
        """Its name, and better ones that did not work, each with its reason."""
        return (self._reader.name, self._reader.passed_over) if self._reader else ("", "")

    def owner_gone(self) -> bool:
        return self._reader is not None and self._reader.owner_gone()

    def locate(self, address: str, keys: Sequence[PageKey], timeout_s: float) -> list[worker_pb2.PageRef]:
        """Where the source has the leading run of these pages. Raises what its answer or its silence says."""
        if self._channel is None:
            self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        request = worker_pb2.LocateRequest(page_keys=pack_keys(keys))
        try:
            answer = worker_pb2_grpc.PageHolderStub(self._channel).Locate(request, timeout=timeout_s)
        except grpc.RpcError as error:  # of a blocking call: it answers the same questions as an AioRpcError
            raise status.from_rpc_error(error) from error  # type: ignore[arg-type]
        if [ref.index for ref in answer.pages] != list(range(min(len(answer.pages), len(keys)))):
            raise DiptychError(f"{address} names pages that it was not asked for", stage=STAGE)
        return list(answer.pages)

    def pull(
        self, refs: Sequence[worker_pb2.PageRef], into: Sequence[PageId], timeout_s: float, after: Event | None
    ) -> int:
        """The bytes moved. Raises as `PageReader.pull` does, and `CorruptPage` where checksums are compared.

        After `WorkerLost` the next pull connects anew.
        """
        if self._reader is None:
            self._reader = registry.connect(self._source, self._segment, self._transports)
        try:
            moved = self._reader.pull([(ref.page, ref.generation) for ref in refs], into, timeout_s, after)
        except WorkerLost:
            self._reader.close()
            self._reader = None
            raise
        if self._checksums is not None:
            self._checksums.compare(refs, into)
        return moved

    def close(self, wait: bool) -> None:
        """End the thread, and the connections in it: giving back a GPU's mapping may take a while."""
        if self._channel is not None:
            self._channel.close()  # from here, so that nobody waits for an answer that may not come
        self.thread.submit(self._hang_up)
        self.thread.shutdown(wait=wait)

    def _hang_up(self) -> None:
        if self._reader is not None:
            self._reader.close()

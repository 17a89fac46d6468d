"""Takes every page that one life of one worker seals."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc.aio

from kvstore.directory import WorkerRecord
from kvstore.sealed_page import SealedPage
from kvstore.tiers.page_tiers import PageTiers
from page_store.intake import Intake
from protos import errors
from protos.v1 import worker_pb2, worker_pb2_grpc
from rpc.server import CHANNEL_OPTIONS

_RETRY_S = (0.1, 0.5, 2.0)  # pauses between attempts; the last one repeats
log = logging.getLogger(__name__)


class Follower:
    """Keeps a `Follow` stream open until `stop`. The next message is read when the last one's pages are here: what a
    worker seals faster than they can be copied waits in the worker, which keeps the newest.
    """

    def __init__(self, record: WorkerRecord, tiers: PageTiers, transports: Sequence[str]) -> None:
        self.record = record
        self._tiers = tiers
        self._transports = transports
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"take from {record.worker_id}")
        self._task = asyncio.create_task(self._keep_open(), name=f"follow {record.worker_id}")

    async def stop(self) -> None:
        """Hang up. Nobody writes into the store's pages for this worker any more when it returns."""
        self._task.cancel()
        await asyncio.wait({self._task})
        await asyncio.to_thread(self._thread.shutdown)

    async def _keep_open(self) -> None:
        failures = 0
        while True:
            try:
                await self._session()
                failures = 0
            except (grpc.aio.AioRpcError, errors.DiptychError) as error:
                log.info("%s is not followed: %r", self.record.worker_id, error)
                failures += 1
            except Exception:  # whatever it is, it is no reason to lose the other workers' pages
                log.exception("following %s failed", self.record.worker_id)
                failures += 1
            await asyncio.sleep(_RETRY_S[min(failures, len(_RETRY_S) - 1)])

    async def _session(self) -> None:
        loop = asyncio.get_running_loop()
        intake = Intake(self._tiers, self.record.source, self._transports)
        try:
            async with grpc.aio.insecure_channel(self.record.address, options=CHANNEL_OPTIONS) as channel:
                async for message in worker_pb2_grpc.WorkerStub(channel).Follow(worker_pb2.FollowRequest()):
                    pages = [SealedPage.from_proto(page) for page in message.pages]
                    await loop.run_in_executor(self._thread, intake.take, pages)
        finally:
            self._thread.submit(intake.close)

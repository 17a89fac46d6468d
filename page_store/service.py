"""The gRPC face of a page store for who wants its pages."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio

from kvstore.keys import PageKey
from kvstore.locate_request import keys_of
from kvstore.sealed_page import SealedPage
from protos.errors import DiptychError, Overloaded
from protos.v1 import worker_pb2, worker_pb2_grpc
from rpc import status

_LOCATE_S = 2.0  # for pages to come from the disk
_SHARE = 0.8  # of the caller's own time, so that the answer arrives within it
_THREADS = 4
_MOST_WAITING = 64
Locate = Callable[[Sequence[PageKey], float], list[SealedPage]]


class HolderService(worker_pb2_grpc.PageHolderServicer):
    """diptych.v1.PageHolder over a function that may block."""

    def __init__(self, locate: Locate) -> None:
        self._locate = locate
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="locate")
        self._waiting = 0

    async def Locate(
        self, request: worker_pb2.LocateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.LocateResponse:
        """The leading run; what is on the disk is brought to the host as far as time allows."""
        left = context.time_remaining()
        timeout_s = _LOCATE_S if left is None else min(_LOCATE_S, _SHARE * left)
        try:
            found = await self._find(keys_of(request), timeout_s)
        except DiptychError as error:
            await status.abort(context, error)
        return worker_pb2.LocateResponse(pages=[page.to_ref(index) for index, page in enumerate(found)])

    async def aclose(self) -> None:
        """End the threads."""
        await asyncio.to_thread(self._threads.shutdown)

    async def _find(self, keys: Sequence[PageKey], timeout_s: float) -> list[SealedPage]:
        if self._waiting >= _MOST_WAITING:
            raise Overloaded(f"{self._waiting} callers wait for pages already", stage="locate")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._locate, keys, timeout_s)
        finally:
            self._waiting -= 1

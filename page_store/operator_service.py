"""The gRPC face of a page store for operators."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc.aio

from kvstore.page_state import PageId
from page_store.measurement import measure
from page_store.shelf import Shelf
from protos.errors import DiptychError, Overloaded
from protos.v1 import page_store_pb2, page_store_pb2_grpc, worker_pb2
from rpc import status
from worker.loan import LOAN_S, MOST_LENT, check_pages


class StoreService(page_store_pb2_grpc.PageStoreServicer):
    """diptych.v1.PageStore. `shelf` raises where there are no pages yet."""

    def __init__(
        self,
        describe: Callable[[], page_store_pb2.PageStoreDescription],
        shelf: Callable[[], Shelf],
        transports: Sequence[str],
    ) -> None:
        self._describe = describe
        self._shelf = shelf
        self._transports = transports
        self._lent = 0  # pages, to all callers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="measure")
        self._measuring: Future[worker_pb2.MeasureResponse] | None = None

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> page_store_pb2.PageStoreDescription:
        return self._describe()

    async def Lend(
        self, request: worker_pb2.LendRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.LendResponse]:
        """Pages for a test, until the caller hangs up or has had time enough for one."""
        lent: list[tuple[PageId, int]] = []
        try:
            shelf = self._shelf()
            # Not in `finally`: grpc closes a generator that is cut off while it sends only when it is collected.
            context.add_done_callback(lambda _: self._give_back(shelf, lent))  # type: ignore[arg-type]
            lent += self._lend(shelf, request.pages)
        except DiptychError as error:
            await status.abort(context, error)
        refs = [worker_pb2.PageRef(index=i, page=page, generation=gen) for i, (page, gen) in enumerate(lent)]
        yield worker_pb2.LendResponse(source=shelf.record().source, pages=refs)
        await asyncio.sleep(LOAN_S)

    async def Measure(
        self, request: worker_pb2.MeasureRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.MeasureResponse:
        """Answers when the last pull has come back. One test at a time."""
        try:
            check_pages(len(request.pages))
            if self._measuring is not None and not self._measuring.done():
                raise Overloaded("a test of transports runs already", stage="measure")
            self._measuring = self._thread.submit(measure, self._shelf().tiers, request, self._transports)
            return await asyncio.wrap_future(self._measuring)
        except DiptychError as error:
            await status.abort(context, error)

    async def aclose(self) -> None:
        """End the thread. Nobody writes into the store's pages for a test any more."""
        await asyncio.to_thread(self._thread.shutdown)

    def _lend(self, shelf: Shelf, count: int) -> list[tuple[PageId, int]]:
        check_pages(count)
        if self._lent + count > MOST_LENT:
            raise Overloaded(f"{self._lent} pages are lent already", stage="measure")
        pages = shelf.tiers.ledger.lend(count)
        self._lent += count
        return pages

    def _give_back(self, shelf: Shelf, lent: Sequence[tuple[PageId, int]]) -> None:
        self._lent -= len(lent)
        for page, _ in lent:
            shelf.tiers.ledger.abandon(page)

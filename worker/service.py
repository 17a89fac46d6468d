"""The gRPC face of a worker."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

import grpc.aio

from protos.errors import DiptychError, InvalidRequest
from protos.v1 import worker_pb2, worker_pb2_grpc
from rpc import status
from worker.follow_buffer import FollowBuffer
from worker.followers import Followers
from worker.loan import LOAN_S, Loan, check_pages
from worker.loop import WorkerLoop
from worker.outbox import Outbox
from worker.page_checksums import PageChecksums


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """diptych.v1.Worker over a `WorkerLoop`."""

    def __init__(
        self,
        loop: WorkerLoop,
        followers: Followers,
        describe: Callable[[], worker_pb2.WorkerDescription],
        drain: Callable[[], None],
        checksums: PageChecksums | None = None,
    ) -> None:
        """With `checksums`, followers hear each page's."""
        self._loop = loop
        self._followers = followers
        self._describe = describe
        self._drain = drain
        self._checksums = checksums

    async def Connect(
        self, messages: AsyncIterator[worker_pb2.RouterMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """Everything between one router and this worker; see worker.proto."""
        try:
            router_id = await self._hello(messages)
        except DiptychError as error:
            await status.abort(context, error)
        outbox = Outbox(asyncio.get_running_loop())
        self._loop.attach(router_id, outbox)
        reader = asyncio.create_task(self._read(router_id, messages, outbox))

        def hung_up(_: object) -> None:
            self._loop.detach(router_id, outbox)
            reader.cancel()

        # Not in `finally`: grpc closes a generator that is cut off while it sends only when it is collected.
        context.add_done_callback(hung_up)  # type: ignore[arg-type]  # the stub wants a named argument
        yield worker_pb2.WorkerMessage(hello=self._describe())
        while (step := await outbox.take()) is not None:
            yield worker_pb2.WorkerMessage(step=step)
        await reader  # raises what broke the stream, if anything did

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.WorkerDescription:
        return self._describe()

    async def Follow(
        self, request: worker_pb2.FollowRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.SealedPages]:
        """The pages that are held now, and then each one that is sealed."""
        buffer = FollowBuffer(asyncio.get_running_loop(), self._followers.most_pages)
        context.add_done_callback(lambda _: buffer.close())  # type: ignore[arg-type]  # as above
        try:
            await asyncio.wrap_future(self._loop.ask(lambda _: self._followers.join(buffer)))
        except DiptychError as error:
            await status.abort(context, error)
        while (pages := await buffer.take()) is not None:
            if self._checksums is not None:
                await asyncio.to_thread(self._checksums.name, [page.ref for page in pages.pages])
            yield pages

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DrainResponse:
        self._drain()
        return worker_pb2.DrainResponse()

    async def Lend(
        self, request: worker_pb2.LendRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.LendResponse]:
        """Pages for a test, until the caller hangs up or has had time enough for one."""
        loan = Loan()
        context.add_done_callback(lambda _: self._give_back(loan))  # type: ignore[arg-type]  # as above
        try:
            check_pages(request.pages)
            refs = await asyncio.wrap_future(self._loop.ask(lambda role: loan.take(role.pool, request.pages)))
        except DiptychError as error:
            await status.abort(context, error)
        yield worker_pb2.LendResponse(source=self._describe().source, pages=refs)
        await asyncio.sleep(LOAN_S)

    async def Measure(
        self, request: worker_pb2.MeasureRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.MeasureResponse:
        """Answers when the last pull has come back."""
        measured: Future[worker_pb2.MeasureResponse | DiptychError] = Future()

        def done(result: worker_pb2.MeasureResponse | DiptychError) -> None:
            if measured.set_running_or_notify_cancel():  # else nobody waits for it any more
                measured.set_result(result)

        try:
            check_pages(len(request.pages))
            await asyncio.wrap_future(self._loop.ask(lambda role: role.measure(request, done)))
            result = await asyncio.wrap_future(measured)
            if isinstance(result, DiptychError):
                raise result
        except DiptychError as error:
            await status.abort(context, error)
        return result

    def _give_back(self, loan: Loan) -> None:
        self._loop.post(loan.give_back)

    @staticmethod
    async def _hello(messages: AsyncIterator[worker_pb2.RouterMessage]) -> str:
        async for message in messages:
            if message.hello.router_id:
                return message.hello.router_id
            break
        raise InvalidRequest("the first message must be a Hello with a router_id", field="hello", stage="connect")

    async def _read(self, router_id: str, messages: AsyncIterator[worker_pb2.RouterMessage], outbox: Outbox) -> None:
        try:
            async for message in messages:
                self._loop.handle(router_id, message)
        finally:
            outbox.close()

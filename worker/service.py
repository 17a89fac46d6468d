"""The gRPC face of a worker."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from protos.errors import DiptychError, InvalidRequest
from protos.v1 import worker_pb2, worker_pb2_grpc
from rpc import status
from worker.loop import WorkerLoop
from worker.outbox import Outbox


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """diptych.v1.Worker over a `WorkerLoop`."""

    def __init__(
        self,
        loop: WorkerLoop,
        describe: Callable[[], worker_pb2.WorkerDescription],
        drain: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._describe = describe
        self._drain = drain

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
        # grpc closes a generator that is cut off while it sends only when it is collected: too late for what it holds.
        context.add_done_callback(lambda _: self._loop.detach(router_id, outbox))  # type: ignore[arg-type]  # its stub
        reader = asyncio.create_task(self._read(router_id, messages))
        try:
            yield worker_pb2.WorkerMessage(hello=self._describe())
            async for step in self._steps(outbox, reader):
                yield worker_pb2.WorkerMessage(step=step)
        finally:
            reader.cancel()

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.WorkerDescription:
        return self._describe()

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DrainResponse:
        self._drain()
        return worker_pb2.DrainResponse()

    @staticmethod
    async def _hello(messages: AsyncIterator[worker_pb2.RouterMessage]) -> str:
        async for message in messages:
            if message.hello.router_id:
                return message.hello.router_id
            break
        raise InvalidRequest("the first message must be a Hello with a router_id", field="hello", stage="connect")

    async def _read(self, router_id: str, messages: AsyncIterator[worker_pb2.RouterMessage]) -> None:
        async for message in messages:
            self._loop.handle(router_id, message)

    @staticmethod
    async def _steps(outbox: Outbox, reader: "asyncio.Task[None]") -> AsyncIterator[worker_pb2.Step]:
        """The outbox's steps until the router hangs up."""
        while True:
            take = asyncio.create_task(outbox.take())
            await asyncio.wait({take, reader}, return_when=asyncio.FIRST_COMPLETED)
            if not take.done():
                take.cancel()
                reader.result()  # raises what broke the stream, if anything did
                return
            yield take.result()

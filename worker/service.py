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

    async def _read(self, router_id: str, messages: AsyncIterator[worker_pb2.RouterMessage], outbox: Outbox) -> None:
        try:
            async for message in messages:
                self._loop.handle(router_id, message)
        finally:
            outbox.close()

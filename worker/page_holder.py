"""Where this worker's pages are, for whoever wants to pull them."""

import asyncio
from typing import Any

import grpc.aio

from kvstore.locate_request import keys_of
from protos.errors import DiptychError
from protos.v1 import worker_pb2, worker_pb2_grpc
from rpc import status
from worker.loop import WorkerLoop


class PageHolder(worker_pb2_grpc.PageHolderServicer):
    """diptych.v1.PageHolder over a `WorkerLoop`."""

    def __init__(self, loop: WorkerLoop) -> None:
        self._loop = loop

    async def Locate(
        self, request: worker_pb2.LocateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.LocateResponse:
        """Answers between two steps."""
        try:
            keys = keys_of(request)
            # Nothing keeps them held: the fence shows what goes meanwhile.
            refs = await asyncio.wrap_future(self._loop.ask(lambda role: role.name_pages(role.pool.match(keys))))
        except DiptychError as error:
            await status.abort(context, error)
        return worker_pb2.LocateResponse(pages=refs)

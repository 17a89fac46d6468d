"""Where this worker's pages are, for whoever wants to pull them."""

import asyncio
from typing import Any

import grpc.aio

from kvstore.keys import KEY_BYTES, PageKey, unpack_keys
from protos.errors import DiptychError, InvalidRequest
from protos.v1 import worker_pb2, worker_pb2_grpc
from rpc import status
from worker.loop import WorkerLoop

_MOST_KEYS = 2**16  # pages of one prompt; 1 MiB of keys


class PageHolder(worker_pb2_grpc.PageHolderServicer):
    """diptych.v1.PageHolder over a `WorkerLoop`."""

    def __init__(self, loop: WorkerLoop) -> None:
        self._loop = loop

    async def Locate(
        self, request: worker_pb2.LocateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.LocateResponse:
        """Answers between two steps."""
        try:
            keys = _read(request)
            # Nothing keeps them held: the fence shows what goes meanwhile.
            refs = await asyncio.wrap_future(self._loop.ask(lambda role: role.name_pages(role.pool.match(keys))))
        except DiptychError as error:
            await status.abort(context, error)
        return worker_pb2.LocateResponse(pages=refs)


def _read(request: worker_pb2.LocateRequest) -> list[PageKey]:
    if len(request.page_keys) > _MOST_KEYS * KEY_BYTES:
        raise InvalidRequest(f"at most {_MOST_KEYS} pages can be asked for", field="page_keys", stage="locate")
    try:
        return unpack_keys(request.page_keys)
    except ValueError as error:
        raise InvalidRequest(str(error), field="page_keys", stage="locate") from error

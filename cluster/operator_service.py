"""`diptych.v1.Operator`: what operators call."""

import asyncio
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cluster.controller import Controller
from protos import errors
from protos.v1 import operator_pb2, operator_pb2_grpc
from rpc import status

SERVICE = operator_pb2.DESCRIPTOR.services_by_name["Operator"].full_name


class OperatorService(operator_pb2_grpc.OperatorServicer):
    """Thin: the controller knows and decides. `ended` is set once all that the controller started has ended."""

    def __init__(self, controller: Controller, ended: asyncio.Event) -> None:
        self._controller = controller
        self._ended = ended

    async def Status(self, request: operator_pb2.StatusRequest, context: Any) -> operator_pb2.StatusResponse:
        """What there is, as of the controller's last look."""
        response = self._controller.status()
        response.version = _version()
        return response

    async def Scale(self, request: operator_pb2.ScaleRequest, context: Any) -> operator_pb2.ScaleResponse:
        """Accept new sizes; `Status` shows how far it is."""
        try:
            self._controller.scale(request.desired)
        except errors.DiptychError as error:
            await status.abort(context, error)
        return operator_pb2.ScaleResponse(pools=self._controller.pools())

    async def Shutdown(self, request: operator_pb2.ShutdownRequest, context: Any) -> operator_pb2.ShutdownResponse:
        """End routers and workers; answers when they have ended."""
        self._controller.shutdown()
        await self._ended.wait()
        return operator_pb2.ShutdownResponse()


def _version() -> str:
    try:
        return version("diptych")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return ""

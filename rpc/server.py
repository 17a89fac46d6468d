"""Starting a gRPC server: health, reflection, typed answers to malformed messages."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from protos import errors
from rpc import status

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_KEEPALIVE = [("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 5_000)]
CHANNEL_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
SERVER_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a second listener
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


@dataclass
class Malformed:
    """Stands in for a request message that did not parse."""

    reason: str


class _MalformedRequests(grpc.aio.ServerInterceptor):
    """Answers bytes that do not parse (invalid UTF-8, say) with `InvalidRequest` instead of INTERNAL.

    Streams from the client are left alone: only our own routers and workers open those.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        parse = handler.request_deserializer

        def deserialize(data: bytes) -> Any:
            try:
                return parse(data) if parse else data
            except Exception as error:  # the parser's own class is private
                return Malformed(str(error))

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _checked_stream(handler.unary_stream), deserialize, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _checked_unary(handler.unary_unary), deserialize, handler.response_serializer
        )


async def _refuse(context: Any, request: Malformed) -> None:
    await status.abort(context, errors.InvalidRequest(f"the message does not parse: {request.reason}", field="message"))


def _checked_unary(behaviour: Any) -> Any:
    async def call(request: Any, context: Any) -> Any:
        if isinstance(request, Malformed):
            await _refuse(context, request)
        return await behaviour(request, context)

    return call


def _checked_stream(behaviour: Any) -> Any:
    async def call(request: Any, context: Any) -> Any:
        if isinstance(request, Malformed):
            await _refuse(context, request)
        async for response in behaviour(request, context):
            yield response

    return call


class RpcServer:
    """A started server. `address` is host:port as bound."""

    def __init__(self, server: grpc.aio.Server, health: HealthServicer, address: str) -> None:
        self._server = server
        self._health = health
        self.address = address

    async def stop(self, grace_s: float = 1.0) -> None:
        """Report NOT_SERVING, let calls end for `grace_s` seconds, then cut them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start_server(
    register: Callable[[grpc.aio.Server], None], services: Sequence[str], host: str, port: int
) -> RpcServer:
    """Bind, add health and reflection for `services`, and start.

    Raises `PortTaken` where the port cannot be bound.
    """
    server = grpc.aio.server(interceptors=(_MalformedRequests(),), options=SERVER_OPTIONS)
    register(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise errors.PortTaken(
            f"cannot listen on {host}:{port}: is another process using it? Choose another port", stage="start"
        ) from error
    await server.start()
    for name in ("", *services):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    return RpcServer(server, health, f"{host}:{bound}")

"""A client of `diptych.v1.Operator` for commands: each call blocks, and raises typed errors."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import grpc

from protos import errors
from protos.v1 import operator_pb2, operator_pb2_grpc
from rpc import status

_CALL_S = 10.0
_SHUTDOWN_S = 60.0


class OperatorClient:
    """Talks to one controller at `endpoint` (host:port)."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._channel = grpc.insecure_channel(endpoint)
        self._stub = operator_pb2_grpc.OperatorStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def status(self) -> operator_pb2.StatusResponse:
        """What there is."""
        response: operator_pb2.StatusResponse = self._call(self._stub.Status, operator_pb2.StatusRequest(), _CALL_S)
        return response

    def scale(self, desired: Mapping[str, int]) -> None:
        """Set the size of the pools that are named."""
        self._call(self._stub.Scale, operator_pb2.ScaleRequest(desired=desired), _CALL_S)

    def shutdown(self) -> None:
        """End routers, workers and the controller; returns when they have ended."""
        self._call(self._stub.Shutdown, operator_pb2.ShutdownRequest(), _SHUTDOWN_S)

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._typed(error) from error

    def _typed(self, error: Any) -> errors.DiptychError:
        said = any(key == status.DETAIL_KEY for key, _ in error.trailing_metadata() or ())
        if error.code() is grpc.StatusCode.UNAVAILABLE and not said:  # grpc's own words
            return errors.WorkerLost(f"no controller answers at {self.endpoint}: {error.details()}", stage="connect")
        return status.from_rpc_error(error)

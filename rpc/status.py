"""Errors on the wire: `DiptychError` <-> gRPC status with an `ErrorDetail` in trailing metadata."""

from collections.abc import Iterable
from typing import Any, NoReturn

import grpc
import grpc.aio

from protos import errors
from protos.v1 import common_pb2

DETAIL_KEY = "diptych-error-bin"

_STATUS: dict[type[errors.DiptychError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownModel: grpc.StatusCode.NOT_FOUND,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PortTaken: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelUnusable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FormatMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FixTheSetup: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NoWorkers: grpc.StatusCode.UNAVAILABLE,
    errors.WorkerLost: grpc.StatusCode.UNAVAILABLE,
    errors.StalePage: grpc.StatusCode.UNAVAILABLE,
    errors.CorruptPage: grpc.StatusCode.UNAVAILABLE,
    errors.MetadataUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.DiptychError: grpc.StatusCode.INTERNAL,
}
_BY_CODE = {cls.code: cls for cls in _STATUS}
_BY_STATUS: dict[grpc.StatusCode, type[errors.DiptychError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.WorkerLost,
}


def status_of(error: errors.DiptychError) -> grpc.StatusCode:
    """The gRPC status for an error: that of its nearest class."""
    return next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)


def to_detail(error: errors.DiptychError) -> common_pb2.ErrorDetail:
    """The error as a message."""
    return common_pb2.ErrorDetail(
        code=error.code,
        message=error.message,
        request_id=error.request_id,
        stage=error.stage,
        field=getattr(error, "field", ""),
        retry_after_s=getattr(error, "retry_after_s", 0.0),
    )


def from_detail(detail: common_pb2.ErrorDetail) -> errors.DiptychError:
    """The message as an error; a code from a newer peer becomes a plain `DiptychError`."""
    cls = _BY_CODE.get(detail.code, errors.DiptychError)
    extra: dict[str, Any] = {}
    if issubclass(cls, errors.InvalidRequest):
        extra["field"] = detail.field
    if issubclass(cls, errors.Overloaded):
        extra["retry_after_s"] = detail.retry_after_s
    return cls(detail.message, request_id=detail.request_id, stage=detail.stage, **extra)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.DiptychError) -> NoReturn:
    """End the call with this error."""
    metadata = ((DETAIL_KEY, to_detail(error).SerializeToString()),)
    await context.abort(status_of(error), str(error), metadata)
    raise AssertionError("abort returned")  # it raises; the type checker does not know


def from_rpc_error(error: grpc.aio.AioRpcError) -> errors.DiptychError:
    """The typed error that a failed call carries, or the nearest one where the peer could not say."""
    for key, value in _pairs(error.trailing_metadata()):
        if key == DETAIL_KEY and isinstance(value, bytes):
            return from_detail(common_pb2.ErrorDetail.FromString(value))
    cls = _BY_STATUS.get(error.code(), errors.DiptychError)
    return cls(error.details() or error.code().name)


def _pairs(metadata: Any) -> Iterable[tuple[str, str | bytes]]:
    return metadata or ()

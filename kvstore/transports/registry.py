"""Which transports there are, and the choice between two workers."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.page_format import PageFormat
from kvstore.segment_base import SegmentBase
from kvstore.transports import cuda_ipc, nixl, shm, tcp
from kvstore.transports.base import STAGE, PageReader, PageServer
from protos import errors
from protos.v1 import worker_pb2

log = logging.getLogger(__name__)


def _always(segment: SegmentBase) -> str:
    return ""


@dataclass(frozen=True)
class _Transport:
    serve: Callable[[SegmentBase, str], PageServer]  # segment, host
    connect: Callable[[str, int, SegmentBase], PageReader]  # address, incarnation, local segment
    cannot_serve: Callable[[SegmentBase], str] = _always  # why a pool's pages cannot be read so; empty where they can
    cannot_fill: Callable[[SegmentBase], str] = _always  # why pages cannot come into a pool so


_TRANSPORTS = {
    cuda_ipc.NAME: _Transport(
        cuda_ipc.CudaIpcServer, cuda_ipc.CudaIpcReader, cuda_ipc.cannot_serve, cuda_ipc.cannot_fill
    ),
    shm.NAME: _Transport(shm.ShmServer, shm.connect, shm.cannot_serve),
    nixl.NAME: _Transport(nixl.NixlServer, nixl.NixlReader, nixl.unavailable, nixl.unavailable),
    tcp.NAME: _Transport(tcp.TcpServer, tcp.TcpReader),
}


def serve(names: Sequence[str], segment: SegmentBase, host: str) -> list[PageServer]:
    """Offer `segment` by those of these transports that are available to it, best first.

    Raises `FixTheSetup` for an unknown name or an unusable host, and, with each one's reason, where none is available.
    """
    if unknown := [name for name in names if name not in _TRANSPORTS]:
        raise errors.FixTheSetup(
            f"no transport is called {unknown[0]!r}: there are {', '.join(_TRANSPORTS)}", stage="start"
        )
    reasons = {name: _TRANSPORTS[name].cannot_serve(segment) for name in names}
    if names and all(reasons.values()):
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise errors.FixTheSetup(f"this worker's pages can be reached by no transport: {listed}", stage="start")
    servers: list[PageServer] = []
    try:
        for name in names:
            if not reasons[name]:
                servers.append(_TRANSPORTS[name].serve(segment, host))
    except errors.FixTheSetup:
        for server in servers:
            server.close()
        raise
    return servers


def connect(source: worker_pb2.PageSource, segment: SegmentBase, allowed: Sequence[str]) -> PageReader:
    """A reader of `source` into `segment`, by the first of its endpoints that works from here.

    Raises `FormatMismatch` with the difference, and `WorkerLost` with the reason of each endpoint.
    """
    if difference := segment.format.difference(PageFormat.from_proto(source.format)):
        message = f"page formats differ, ours against that of {source.worker_id}: {difference}"
        raise errors.FormatMismatch(message, stage=STAGE)
    reasons: list[str] = []
    for endpoint in source.endpoints:
        name = endpoint.transport
        if reason := _unusable(name, segment, allowed):
            reasons.append(f"{name}: {reason}")
            continue
        try:
            reader = _TRANSPORTS[name].connect(endpoint.address, source.incarnation, segment)
        except errors.WorkerLost as error:
            reasons.append(f"{name}: {error.message}")
            continue
        reader.passed_over = "; ".join(reasons)
        if reasons:
            log.warning("pages of %s come by %s, because of %s", source.worker_id, name, reader.passed_over)
        return reader
    raise errors.WorkerLost(
        f"{source.worker_id} cannot be reached: {'; '.join(reasons) or 'it offers no transport'}", stage=STAGE
    )


def _unusable(name: str, segment: SegmentBase, allowed: Sequence[str]) -> str:
    if name not in _TRANSPORTS:
        return "not known here"
    return "not allowed here" if name not in allowed else _TRANSPORTS[name].cannot_fill(segment)

"""Which transports there are, and the choice between two workers."""

from collections.abc import Callable, Sequence

from kvstore.page_format import PageFormat
from kvstore.segment import Segment
from kvstore.transports import shm, tcp
from kvstore.transports.base import STAGE, PageReader, PageServer
from protos import errors
from protos.v1 import worker_pb2

_SERVERS: dict[str, Callable[[Segment, str], PageServer]] = {
    shm.NAME: shm.ShmServer,
    tcp.NAME: tcp.TcpServer,
}
# Address, incarnation, local segment.
_READERS: dict[str, Callable[[str, int, Segment], PageReader]] = {
    shm.NAME: shm.ShmReader,
    tcp.NAME: tcp.TcpReader,
}


def serve(names: Sequence[str], segment: Segment, host: str) -> list[PageServer]:
    """Offer `segment` by these transports, best first. Raises `FixTheSetup` for an unknown name or an unusable host."""
    servers: list[PageServer] = []
    try:
        for name in names:
            if name not in _SERVERS:
                known = ", ".join(_SERVERS)
                raise errors.FixTheSetup(f"no transport is called {name!r}: there are {known}", stage="start")
            servers.append(_SERVERS[name](segment, host))
    except errors.FixTheSetup:
        for server in servers:
            server.close()
        raise
    return servers


def connect(source: worker_pb2.PageSource, segment: Segment, allowed: Sequence[str]) -> PageReader:
    """A reader of `source` into `segment`, by the first of its endpoints that works from here.

    Raises `FormatMismatch` with the difference, and `WorkerLost` with the reason of each endpoint.
    """
    if difference := segment.format.difference(PageFormat.from_proto(source.format)):
        message = f"page formats differ, ours against that of {source.worker_id}: {difference}"
        raise errors.FormatMismatch(message, stage=STAGE)
    reasons: list[str] = []
    for endpoint in source.endpoints:
        name = endpoint.transport
        if name not in allowed or name not in _READERS:
            reasons.append(f"{name}: not allowed here" if name in _READERS else f"{name}: not known here")
            continue
        try:
            return _READERS[name](endpoint.address, source.incarnation, segment)
        except errors.WorkerLost as error:
            reasons.append(f"{name}: {error.message}")
    raise errors.WorkerLost(
        f"{source.worker_id} cannot be reached: {'; '.join(reasons) or 'it offers no transport'}", stage=STAGE
    )

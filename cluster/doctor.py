"""Measures how pages move between pools and page stores, and says which paths are slower than they should be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import grpc

from cluster.config import POOLS
from kvstore.directory import STORE_POOL
from kvstore.page_format import PageFormat
from protos.v1 import operator_pb2, page_store_pb2, page_store_pb2_grpc, worker_pb2, worker_pb2_grpc
from router.placement import BANDWIDTH
from rpc import status

_CALL_S = 10.0
_MEASURE_S = 120.0
_PULL_BYTES = 64 << 20
_SLOW = 0.5  # of the median rate of the paths of the same tier and transport, and of the rate that placement counts on
_TELLING_MIB = 16  # a smaller pull says more of latency than of a rate
_ANSWERING = (operator_pb2.WORKER_STATE_READY, operator_pb2.WORKER_STATE_DRAINING)
POOL_TO_POOL, HOST_UP, HOST_DOWN = "pool to pool", "host tier up", "host tier down"


class End(NamedTuple):
    """A worker or a page store."""

    id: str
    address: str
    pool: str

    @property
    def host(self) -> str:
        """Where it runs."""
        return self.address.rpartition(":")[0]


@dataclass(frozen=True)
class Path:
    """From one pool or page store into another. Where `error` is set nothing was measured."""

    source: str
    reader: str
    tier: str  # POOL_TO_POOL, or between a node's page store and its workers: HOST_UP, HOST_DOWN
    transport: str = ""
    gb_per_s: float = 0.0
    pull_mib: float = 0.0
    page_ms: float = 0.0  # one page alone, from the order to its generation's check
    slow: str = ""  # why it is slower than expected
    error: str = ""


def paths_of(cluster: operator_pb2.StatusResponse) -> list[tuple[End, End]]:
    """Source and reader of every path that pages take between those that answer."""
    ends = [
        End(worker.worker_id, worker.address, status.pool)
        for status in cluster.pools
        for worker in status.workers
        if worker.state in _ANSWERING
    ]
    return [(source, reader) for source in ends for reader in ends if source != reader and _is_path(source, reader)]


def _is_path(source: End, reader: End) -> bool:
    """Decode takes prompts from prefill; who computes prompts fetches prefixes from anyone. Stores serve their node."""
    near = source.host == reader.host
    match reader.pool:
        case "decode":
            return source.pool == "prefill"
        case "prefill" | "colocated":
            return source.pool in POOLS or (source.pool == STORE_POOL and near)
        case _:
            return reader.pool == STORE_POOL and source.pool in POOLS and near


def measure(source: End, reader: End, most_bytes: int = _PULL_BYTES, timeout_s: float = _MEASURE_S) -> Path:
    """How fast pages move between the two. One pull has `most_bytes` at most; each call may take `timeout_s`."""
    path = Path(source.id, reader.id, tier_of(source, reader))
    try:
        with grpc.insecure_channel(source.address) as there, grpc.insecure_channel(reader.address) as here:
            owner, puller = _stub(source, there), _stub(reader, here)
            count = _page_count(owner, puller, most_bytes)
            lending = owner.Lend(worker_pb2.LendRequest(pages=count), timeout=timeout_s)
            loan = next(lending)
            request = worker_pb2.MeasureRequest(source=loan.source, pages=loan.pages)
            found = puller.Measure(request, timeout=timeout_s)
            lending.cancel()
    except grpc.RpcError as error:
        failed: Any = error  # the blocking client's errors have what an AioRpcError has
        return replace(path, error=status.from_rpc_error(failed).message)
    return replace(
        path,
        transport=found.transport,
        gb_per_s=found.bytes / max(found.pull_ms, 1e-6) / 1e6,
        pull_mib=found.bytes / (1 << 20),
        page_ms=found.page_ms,
        slow=found.passed_over,
    )


def tier_of(source: End, reader: End) -> str:
    """Which kind of path it is."""
    if source.pool == STORE_POOL:
        return HOST_UP
    return HOST_DOWN if reader.pool == STORE_POOL else POOL_TO_POOL


def _stub(end: End, channel: grpc.Channel) -> Any:
    """Both services have Describe, Lend and Measure."""
    stub = page_store_pb2_grpc.PageStoreStub if end.pool == STORE_POOL else worker_pb2_grpc.WorkerStub
    return stub(channel)


def _page_count(owner: Any, puller: Any, most_bytes: int) -> int:
    """Pages of one pull: enough for a rate, and no more than half of what is free, as requests go on meanwhile."""
    both = [stub.Describe(worker_pb2.DescribeRequest(), timeout=_CALL_S) for stub in (owner, puller)]
    formats = [PageFormat.from_proto(end.source.format) for end in both if end.HasField("source")]
    page_bytes = max((page_format.page_bytes for page_format in formats), default=most_bytes)
    return int(max(1, min(1024, most_bytes // page_bytes, *(_free(end) // 2 for end in both))))


def _free(end: worker_pb2.WorkerDescription | page_store_pb2.PageStoreDescription) -> int:
    """Pages to spare. A page store is full as a rule, and gives up what was not used for longest; half is left."""
    if isinstance(end, page_store_pb2.PageStoreDescription):
        return int(end.host.total_pages // 2)
    return int(end.load.available_pages)


def flag_slow(paths: Sequence[Path]) -> list[Path]:
    """The same paths; marked where one has less than half the rate that is usual for its like here, or expected.

    What is expected of a transport is what the router's placement counts on. It counts on nothing for pages on their
    way into a page store: no request waits for them.
    """
    return [path if path.error or path.slow else replace(path, slow=_why_slow(path, paths)) for path in paths]


def _why_slow(path: Path, paths: Sequence[Path]) -> str:
    like = (path.tier, path.transport)
    usual = median([other.gb_per_s for other in paths if (other.tier, other.transport) == like])
    if path.gb_per_s < _SLOW * usual:
        return f"{usual:.1f} GB/s is usual for {path.transport} here"
    expected = BANDWIDTH.get(path.transport, 0.0) / 1e9 if path.tier != HOST_DOWN else 0.0
    if path.pull_mib >= _TELLING_MIB and path.gb_per_s < _SLOW * expected:
        return f"placement counts on {expected:.1f} GB/s by {path.transport}"
    return ""

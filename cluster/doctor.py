"""Measures how pages move between the workers of a cluster, and says which paths are slower than they should be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import grpc

from kvstore.page_format import PageFormat
from protos.v1 import worker_pb2, worker_pb2_grpc
from router.placement import BANDWIDTH
from rpc import status

_CALL_S = 10.0
_MEASURE_S = 120.0
_PULL_BYTES = 64 << 20
_SLOW = 0.5  # of the median rate of the paths of the same transport, and of the rate that placement counts on
_TELLING_MIB = 16  # a smaller pull says more of latency than of a rate


@dataclass(frozen=True)
class Path:
    """From one worker's pool into another's. Where `error` is set nothing was measured."""

    source: str
    reader: str
    transport: str = ""
    gb_per_s: float = 0.0
    pull_mib: float = 0.0
    page_ms: float = 0.0  # one page alone, from the order to its generation's check
    slow: str = ""  # why it is slower than expected
    error: str = ""


def measure(source: tuple[str, str], reader: tuple[str, str]) -> Path:
    """The path between two workers, each given by its id and its address."""
    path = Path(source[0], reader[0])
    try:
        with grpc.insecure_channel(source[1]) as there, grpc.insecure_channel(reader[1]) as here:
            owner, puller = worker_pb2_grpc.WorkerStub(there), worker_pb2_grpc.WorkerStub(here)
            lending = owner.Lend(worker_pb2.LendRequest(pages=_page_count(owner, puller)), timeout=_MEASURE_S)
            loan = next(lending)
            request = worker_pb2.MeasureRequest(source=loan.source, pages=loan.pages)
            found = puller.Measure(request, timeout=_MEASURE_S)
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


def _page_count(owner: worker_pb2_grpc.WorkerStub, puller: worker_pb2_grpc.WorkerStub) -> int:
    """Pages of one pull: enough for a rate, and no more than half of what is free, as requests go on meanwhile."""
    both = [stub.Describe(worker_pb2.DescribeRequest(), timeout=_CALL_S) for stub in (owner, puller)]
    page_bytes = PageFormat.from_proto(both[0].source.format).page_bytes
    free = min(worker.load.available_pages for worker in both)
    return int(max(1, min(1024, _PULL_BYTES // page_bytes, free // 2)))


def flag_slow(paths: Sequence[Path]) -> list[Path]:
    """The same paths; marked where one has less than half the rate that is usual for its transport here, or expected.

    What is expected of a transport is what the router's placement counts on.
    """
    return [path if path.error or path.slow else replace(path, slow=_why_slow(path, paths)) for path in paths]


def _why_slow(path: Path, paths: Sequence[Path]) -> str:
    usual = median([other.gb_per_s for other in paths if other.transport == path.transport])
    if path.gb_per_s < _SLOW * usual:
        return f"{usual:.1f} GB/s is usual for {path.transport} here"
    expected = BANDWIDTH.get(path.transport, 0.0) / 1e9
    if path.pull_mib >= _TELLING_MIB and path.gb_per_s < _SLOW * expected:
        return f"placement counts on {expected:.1f} GB/s by {path.transport}"
    return ""

"""How fast pages come from a worker into a store: pulls of one page, and of many at once."""

import time
from collections.abc import Sequence
from statistics import median

from kvstore.page_state import PageId
from kvstore.tiers.page_tiers import PageTiers
from kvstore.transports import registry
from kvstore.transports.base import PageReader
from protos.v1 import worker_pb2

_PULLS = 5  # of each size; before them one that connects
_PULL_S = 10.0


def measure(
    tiers: PageTiers, request: worker_pb2.MeasureRequest, transports: Sequence[str]
) -> worker_pb2.MeasureResponse:
    """Blocks, no longer than `_PULL_S` where the worker stalls.

    Raises `OutOfPages`, `FormatMismatch`, `WorkerLost`, and `StalePage` for what is not lent any more.
    """
    room = tiers.ledger.lend(len(request.pages))
    try:
        reader = registry.connect(request.source, tiers.segment, transports)
        try:
            return _measure(reader, request.pages, [page for page, _ in room])
        finally:
            reader.close()
    finally:
        for page, _ in room:
            tiers.ledger.abandon(page)


def _measure(
    reader: PageReader, refs: Sequence[worker_pb2.PageRef], into: Sequence[PageId]
) -> worker_pb2.MeasureResponse:
    named = [(ref.page, ref.generation) for ref in refs]
    times: list[float] = []
    for count in [1] + [1] * _PULLS + [len(refs)] * _PULLS:
        started = time.perf_counter()
        moved = reader.pull(named[:count], into[:count], _PULL_S)
        times.append((time.perf_counter() - started) * 1e3)
    return worker_pb2.MeasureResponse(
        transport=reader.name,
        passed_over=reader.passed_over,
        page_ms=median(times[1 : 1 + _PULLS]),
        pull_ms=median(times[1 + _PULLS :]),
        bytes=moved,
    )

"""Waiting until a cluster is ready, telling how far it is."""

import time
from collections.abc import Callable

from cluster.operator_client import OperatorClient
from protos import errors
from protos.v1 import operator_pb2

Show = Callable[[str, str], None]  # phase, and what is being done in it

_POLL_S = 0.2


def wait_ready(operator: str, give_up: float, show: Show) -> str:
    """Wait until every pool has its workers and no others, and a router answers; the router's address.

    `give_up` is in `time.monotonic()`. Raises `FixTheSetup` once a pool is reported as failed, `DeadlineExceeded`.
    """
    with OperatorClient(operator) as client:
        while True:
            cluster = client.status()
            if cluster.ready and _is_settled(cluster):
                return cluster.routers[0]
            if reason := failure(cluster):
                raise errors.FixTheSetup(reason, stage="start")
            phase, detail = progress(cluster)
            show(phase, detail)
            if time.monotonic() > give_up:
                raise errors.DeadlineExceeded(f"the cluster is not ready in time: {detail}", stage="start")
            time.sleep(_POLL_S)


def _is_settled(cluster: operator_pb2.StatusResponse) -> bool:
    """Nobody is leaving any more."""
    return all(count_ready(pool) == len(pool.workers) for pool in cluster.pools)


def failure(cluster: operator_pb2.StatusResponse) -> str:
    """Which workers failed and why; empty where none did."""
    return "; ".join(
        f"{worker.worker_id} failed: {worker.message}"
        for pool in cluster.pools
        for worker in pool.workers
        if worker.state == operator_pb2.WORKER_STATE_FAILED
    )


def progress(cluster: operator_pb2.StatusResponse) -> tuple[str, str]:
    """The phase, and how far each pool is with what its first starting worker does."""
    counts = {pool.pool: (count_ready(pool), pool.desired) for pool in cluster.pools}
    doing = [
        f"{worker.worker_id}: {worker.message}"
        for pool in cluster.pools
        for worker in pool.workers
        if worker.message and worker.state != operator_pb2.WORKER_STATE_READY
    ]
    parts = [f"{pool} {ready}/{desired}" for pool, (ready, desired) in counts.items()]
    workers_ready = all(ready == desired for pool, (ready, desired) in counts.items() if pool != "router")
    return "router" if workers_ready else "workers", ", ".join([*parts, *doing[:1]])


def count_ready(pool: operator_pb2.PoolStatus) -> int:
    """How many workers of the pool serve."""
    return sum(worker.state == operator_pb2.WORKER_STATE_READY for worker in pool.workers)

"""Measures how pages move between those that join a cluster and those that are there, once, in the background."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from cluster.doctor import End, Path, flag_slow, measure, paths_of, tier_of
from protos.v1 import operator_pb2

_PAUSE_S = 1.0  # between two tests, in which whoever is busy by now can be seen to be
_PULL_BYTES = 16 << 20
_CALL_S = 5.0
log = logging.getLogger(__name__)
_quick = partial(measure, most_bytes=_PULL_BYTES, timeout_s=_CALL_S)


class SelfTest:
    """Tests each path once, when neither end has anything to do; one path at a time. Says what it finds in the log."""

    def __init__(
        self,
        status: Callable[[], operator_pb2.StatusResponse],
        measure: Callable[[End, End], Path] = _quick,
        pause_s: float = _PAUSE_S,
    ) -> None:
        """`measure` may block: it is called in a thread."""
        self._status = status
        self._measure = measure
        self._pause_s = pause_s
        self._found: dict[tuple[str, str], Path] = {}  # by source and reader, as long as both are there

    async def run(self) -> None:
        """Until it is cancelled; then a test that runs is waited for."""
        while True:
            await asyncio.sleep(self._pause_s)
            await self._test_next(self._status())

    async def _test_next(self, cluster: operator_pb2.StatusResponse) -> None:
        paths = {(source.id, reader.id): (source, reader) for source, reader in paths_of(cluster)}
        self._found = {ids: path for ids, path in self._found.items() if ids in paths}
        idle = _idle(cluster)
        for ids, (source, reader) in paths.items():
            if ids not in self._found and idle.issuperset(ids):
                self._found[ids] = await self._test(source, reader)  # the newest stands last
                _tell(flag_slow(list(self._found.values()))[-1])
                return

    async def _test(self, source: End, reader: End) -> Path:
        test = asyncio.create_task(asyncio.to_thread(self._measure, source, reader))
        try:
            return await asyncio.shield(test)
        except Exception as error:  # a bug in one test must not end those to come
            log.exception("%s to %s could not be tested", source.id, reader.id)
            return Path(source.id, reader.id, tier_of(source, reader), error=repr(error))
        finally:
            await asyncio.wait({test})


def _idle(cluster: operator_pb2.StatusResponse) -> set[str]:
    """Ids of those that take requests and have none."""
    workers = [worker for pool in cluster.pools for worker in pool.workers]
    return {
        worker.worker_id
        for worker in workers
        if worker.state == operator_pb2.WORKER_STATE_READY
        and not (worker.load.running or worker.load.waiting or worker.load.queued_tokens)
    }


def _tell(path: Path) -> None:
    ends = f"{path.source} to {path.reader} ({path.tier})"
    if path.error:
        log.warning("%s: pages do not move: %s", ends, path.error)
        return
    rate = f"{path.gb_per_s:.2f} GB/s by {path.transport}, one page in {path.page_ms:.2f} ms"
    if path.slow:
        log.warning("%s: %s, slower than expected: %s", ends, rate, path.slow)
    else:
        log.info("%s: %s", ends, rate)

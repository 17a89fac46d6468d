"""The self-test of paths: each once, one at a time, when nobody is at work."""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager

from cluster.doctor import POOL_TO_POOL, End, Path
from cluster.self_test import SelfTest
from protos.v1 import operator_pb2
from router_rig import until

READY, DRAINING = operator_pb2.WORKER_STATE_READY, operator_pb2.WORKER_STATE_DRAINING


class Town:
    """A prefill and a decode worker, and what is measured between them."""

    def __init__(self) -> None:
        self.cluster = operator_pb2.StatusResponse()
        self.prefill, self.decode = self.add("prefill", "p1"), self.add("decode", "d1")
        self.measured: list[tuple[str, str]] = []
        self.act: Callable[[], None] = lambda: None
        self.rate = 2.0

    def add(self, pool: str, worker_id: str) -> operator_pb2.WorkerStatus:
        status = self.cluster.pools.add(pool=pool)
        return status.workers.add(worker_id=worker_id, address=f"{worker_id}:1", state=READY)

    def measure(self, source: End, reader: End) -> Path:
        self.measured.append((source.id, reader.id))
        self.act()
        return Path(source.id, reader.id, POOL_TO_POOL, "tcp", self.rate, 16.0, 1.0)

    @asynccontextmanager
    async def tested(self):
        task = asyncio.create_task(SelfTest(lambda: self.cluster, self.measure, 0.001).run())
        yield task
        task.cancel()
        await asyncio.wait({task})

    async def rest(self) -> None:
        """Time in which many more tests could have been made."""
        await asyncio.sleep(0.1)


async def test_each_path_is_tested_once_and_again_for_who_joins():
    town = Town()
    async with town.tested():
        await until(lambda: len(town.measured) == 2)
        await town.rest()
        assert town.measured == [("p1", "d1"), ("d1", "p1")]
        town.add("decode", "d2")
        await until(lambda: len(town.measured) == 4)
        assert town.measured[2:] == [("p1", "d2"), ("d2", "p1")]
        del town.cluster.pools[-1]
        await town.rest()
        town.add("decode", "d2")  # an id does not come back; were it to, it would be somebody else
        await until(lambda: len(town.measured) == 6)


async def test_whoever_has_work_or_leaves_is_not_tested():
    town = Town()
    town.decode.load.running = 1
    async with town.tested():
        await town.rest()
        assert not town.measured
        town.decode.load.running, town.prefill.load.queued_tokens = 0, 5
        await town.rest()
        assert not town.measured
        town.prefill.load.queued_tokens, town.decode.state = 0, DRAINING
        await town.rest()
        assert not town.measured
        town.decode.state = READY
        await until(lambda: len(town.measured) == 2)


async def test_the_log_names_each_path_and_warns_of_a_slow_one(caplog):
    town = Town()
    caplog.set_level(logging.INFO)
    async with town.tested():
        await until(lambda: len(caplog.records) == 2)
        town.rate = 0.1
        town.add("colocated", "c1")
        await until(lambda: len(caplog.records) == 5)
    good, slow = caplog.records[0], caplog.records[2]
    assert (good.levelno, good.message) == (
        logging.INFO,
        "p1 to d1 (pool to pool): 2.00 GB/s by tcp, one page in 1.00 ms",
    )
    assert slow.levelno == logging.WARNING
    assert "slower than expected: 2.0 GB/s is usual for tcp here" in slow.message


async def test_a_test_that_fails_does_not_end_the_others(caplog):
    town = Town()

    def fail() -> None:
        raise RuntimeError("a bug")

    town.act = fail
    async with town.tested():
        await until(lambda: len(town.measured) == 2)
    assert town.measured == [("p1", "d1"), ("d1", "p1")]
    assert "p1 to d1 (pool to pool): pages do not move: RuntimeError('a bug')" in caplog.text


async def test_one_at_a_time_and_none_runs_on_when_it_ends():
    town = Town()
    go, ended = threading.Event(), threading.Event()

    def wait() -> None:
        go.wait(10)
        ended.set()

    town.act = wait
    async with town.tested() as task:
        await until(lambda: town.measured)
        await town.rest()
        assert len(town.measured) == 1
        task.cancel()
        await town.rest()
        assert not task.done()
        go.set()
        await asyncio.wait({task}, timeout=10)
    assert ended.is_set()
    assert task.cancelled()

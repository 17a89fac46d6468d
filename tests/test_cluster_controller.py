"""The controller and its operator service against processes that a test plays. No Ray."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from cluster import member
from cluster.config import load_config
from cluster.controller import Controller
from cluster.fake_launcher import FakeLauncher, FakeProcess
from cluster.operator_service import SERVICE, OperatorService
from cluster.reconcile import Policy
from protos import errors
from protos.v1 import operator_pb2, operator_pb2_grpc, worker_pb2
from rpc import status
from rpc.server import start_server

POLICY = Policy(first_delay_s=0.01, max_delay_s=0.05, max_failures=3, stable_s=60.0, drain_timeout_s=60.0)
FAILED = operator_pb2.WORKER_STATE_FAILED


class Rig:
    """A controller that runs, and what its processes are told."""

    def __init__(self, policy: Policy = POLICY, stores: int = 0, **given: Any) -> None:
        settings = {"redis": "redis://user:secret@host:1/0"} | given
        self.launcher = FakeLauncher()
        self.redis_up = True
        self.controller = Controller(load_config(None, settings), self.launcher, self._ping, policy, stores)

    async def _ping(self) -> None:
        if not self.redis_up:
            raise errors.MetadataUnavailable("gone")

    async def __aenter__(self) -> "Rig":
        self.task = asyncio.create_task(self.controller.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.controller.shutdown()
        await asyncio.wait_for(self.task, 30)

    def pool(self, name: str) -> operator_pb2.PoolStatus:
        return next(pool for pool in self.controller.status().pools if pool.pool == name)

    def failed(self, name: str) -> list[operator_pb2.WorkerStatus]:
        return [worker for worker in self.pool(name).workers if worker.state == FAILED]

    async def ready(self) -> None:
        await until(lambda: self.controller.status().ready)


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, "did not come true"
        await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.controller._TICK_S", 0.02)


async def test_starts_what_is_desired_and_says_so():
    async with Rig(prefill=1, decode=2) as rig:
        await rig.ready()
        assert rig.launcher.living("prefill") == ["prefill-1"]
        assert rig.launcher.living("decode") == ["decode-1", "decode-2"]
        answer = rig.controller.status()
        assert list(answer.routers) == ["router-1:50051"]
        assert answer.redis == "redis://user:***@host:1/0"
        assert answer.redis_alive
        assert [(pool.pool, pool.desired, len(pool.workers)) for pool in answer.pools] == [
            ("prefill", 1, 1),
            ("decode", 2, 2),
            ("router", 1, 1),
        ]
        worker = rig.pool("prefill").workers[0]
        assert worker.address.startswith("prefill-1:")
        assert worker.node == "node-1"
        assert worker.state == operator_pb2.WORKER_STATE_READY
    assert not [id_ for id_, process in rig.launcher.processes.items() if not process.dead]


async def test_is_not_ready_while_a_worker_starts_or_a_router_is_silent():
    rig = Rig()

    def prepare(process: FakeProcess) -> None:
        process.silent = process.worker_id.startswith("router")
        if process.worker_id.startswith("decode"):
            process.may_start.clear()

    rig.launcher.prepare = prepare
    async with rig:
        await until(lambda: len(rig.launcher.processes) == 3)
        await until(lambda: rig.pool("decode").workers[0].message == "loading the model")
        assert not rig.controller.status().ready
        rig.launcher.processes["decode-1"].may_start.set()
        await until(lambda: rig.pool("decode").workers[0].state == operator_pb2.WORKER_STATE_READY)
        await until(lambda: "does not answer" in rig.pool("router").workers[0].message)
        assert not rig.controller.status().ready
        rig.launcher.processes["router-1"].silent = False
        await rig.ready()


async def test_a_dead_worker_is_replaced_and_the_other_pool_is_left_alone():
    async with Rig() as rig:
        await rig.ready()
        rig.launcher.processes["decode-1"].die("killed")
        await until(lambda: rig.launcher.living("decode") == ["decode-2"])
        await rig.ready()
        assert rig.launcher.living("prefill") == ["prefill-1"]
        assert not rig.failed("decode")


async def test_a_dead_router_is_replaced_on_its_port():
    async with Rig(port=0) as rig:
        await rig.ready()
        first = rig.launcher.processes["router-1"]
        first.die("killed")
        await until(lambda: list(rig.controller.status().routers) == [f"router-2:{first.port}"])


async def test_failures_in_a_row_are_reported_and_tried_again_until_it_works():
    rig = Rig()
    broken = True

    def prepare(process: FakeProcess) -> None:
        if broken and process.worker_id.startswith("decode"):
            process.start_error = errors.WorkerLost("no memory")

    rig.launcher.prepare = prepare
    async with rig:
        await until(lambda: bool(rig.failed("decode")))
        assert "decode-4" not in rig.launcher.processes or rig.failed("decode")[0].worker_id != "decode-1"
        assert "no memory (3 times in a row)" in rig.failed("decode")[0].message
        assert not rig.failed("prefill")
        assert not rig.controller.status().ready
        broken = False
        await rig.ready()


async def test_what_an_operator_must_mend_is_reported_at_once_and_scale_tries_anew():
    rig = Rig(policy=Policy(first_delay_s=3600, max_delay_s=3600))
    rig.launcher.prepare = lambda process: setattr(process, "start_error", errors.ModelUnusable("no weights"))
    async with rig:
        await until(lambda: bool(rig.failed("prefill")))
        assert rig.failed("prefill")[0].message == "no weights"
        assert rig.launcher.living("prefill") == []
        rig.launcher.prepare = lambda process: None
        rig.controller.scale({"prefill": 1})
        await until(lambda: rig.launcher.living("prefill") == ["prefill-2"])
        assert not rig.failed("prefill")


async def test_a_worker_without_a_place_says_why(monkeypatch):
    monkeypatch.setattr(member, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(member, "_PLACE_S", 0.5)
    rig = Rig(policy=Policy(first_delay_s=3600, max_delay_s=3600, max_failures=1))

    def prepare(process: FakeProcess) -> None:
        if process.worker_id.startswith("prefill"):
            process.placed.clear()

    rig.launcher.prepare = prepare
    async with rig:
        why = "waiting for a place: no node is large enough"
        await until(lambda: [worker.message for worker in rig.pool("prefill").workers] == [why])
        await until(lambda: bool(rig.failed("prefill")))
        assert rig.failed("prefill")[0].message == f"no node had room for it (0 s); {why}"
        assert rig.launcher.processes["prefill-1"].dead


async def test_scaling_down_drains_the_least_loaded_and_waits_for_it():
    async with Rig(decode=3) as rig:
        await rig.ready()
        for number, running in ((1, 0), (2, 5), (3, 5)):
            rig.launcher.processes[f"decode-{number}"].load = worker_pb2.WorkerLoad(running=running)
        await until(lambda: [worker.load.running for worker in rig.pool("decode").workers] == [0, 5, 5])
        rig.controller.scale({"decode": 2})
        leaving = rig.launcher.processes["decode-1"]
        await until(lambda: leaving.calls == ["drain"])
        await rig.ready()  # the pool is as desired, the leaving worker on top
        assert [worker.state for worker in rig.pool("decode").workers].count(operator_pb2.WORKER_STATE_DRAINING) == 1
        await asyncio.sleep(0.1)
        assert not leaving.dead
        leaving.drained.set()
        await until(lambda: leaving.dead)
        assert leaving.calls == ["drain", "stop", "kill"]
        await until(lambda: len(rig.pool("decode").workers) == 2)
        assert rig.launcher.living("prefill") == ["prefill-1"]


async def test_a_worker_that_dies_while_it_drains_is_not_replaced():
    async with Rig(decode=2) as rig:
        await rig.ready()
        rig.controller.scale({"decode": 1})
        await until(lambda: rig.launcher.processes["decode-2"].calls == ["drain"])
        rig.launcher.processes["decode-2"].die("killed")
        await until(lambda: len(rig.pool("decode").workers) == 1)
        await asyncio.sleep(0.1)
        assert list(rig.launcher.processes) == ["prefill-1", "decode-1", "decode-2", "router-1"]


async def test_a_drain_has_an_end():
    async with Rig(decode=1, policy=Policy(drain_timeout_s=0.05)) as rig:
        await rig.ready()
        rig.controller.scale({"decode": 0})
        await until(lambda: rig.launcher.processes["decode-1"].dead)
        await rig.ready()


async def test_a_worker_that_has_not_started_is_stopped_without_draining():
    rig = Rig(decode=2)
    rig.launcher.prepare = lambda process: process.may_start.clear() if process.worker_id == "decode-2" else None
    async with rig:
        await until(lambda: "decode-2" in rig.launcher.processes)
        rig.controller.scale({"decode": 1})
        await until(lambda: rig.launcher.processes["decode-2"].dead)
        assert rig.launcher.processes["decode-2"].calls == ["kill"]


async def test_colocated_workers_are_started_replaced_and_drained_like_any_other():
    async with Rig(mode="colocated") as rig:
        await rig.ready()
        assert [(pool.pool, pool.desired) for pool in rig.controller.pools()] == [("colocated", 1), ("router", 1)]
        rig.controller.scale({"colocated": 2})
        await rig.ready()
        rig.launcher.processes["colocated-1"].die("killed")
        await until(lambda: rig.launcher.living("colocated") == ["colocated-2", "colocated-3"])
        await rig.ready()
        leaving = rig.launcher.processes["colocated-3"]
        rig.controller.scale({"colocated": 1})
        await until(lambda: leaving.calls == ["drain"])
        leaving.drained.set()
        await until(lambda: rig.launcher.living("colocated") == ["colocated-2"])


async def test_pools_of_the_other_mode_are_listed_while_they_are_used():
    async with Rig() as rig:
        await rig.ready()
        rig.controller.scale({"colocated": 1, "decode": 0})
        await until(lambda: rig.launcher.living("colocated") == ["colocated-1"])
        assert [pool.pool for pool in rig.controller.pools()] == ["prefill", "decode", "colocated", "router"]
        rig.launcher.processes["colocated-1"].drained.set()
        rig.controller.scale({"colocated": 0})
        await until(lambda: [pool.pool for pool in rig.controller.pools()] == ["prefill", "decode", "router"])


@pytest.mark.parametrize("desired", [{"router": 2}, {"gpu": 1}, {"decode": 1025}, {"prefill": 1, "decode": -1}])
async def test_scale_refuses_what_cannot_be_and_changes_nothing(desired):
    async with Rig() as rig:
        with pytest.raises(errors.InvalidRequest) as caught:
            rig.controller.scale(desired)
        assert caught.value.field == "desired"
        assert [pool.desired for pool in rig.controller.status().pools] == [1, 1, 1]


async def test_redis_is_watched():
    async with Rig() as rig:
        await until(lambda: rig.controller.status().redis_alive)
        rig.redis_up = False
        await until(lambda: not rig.controller.status().redis_alive)


async def test_shutdown_stops_the_router_before_the_workers_and_ends_all():
    rig = Rig()
    order: list[str] = []
    async with rig:
        await rig.ready()
        for worker_id, process in rig.launcher.processes.items():
            stop = process.stop

            async def noted(worker_id=worker_id, stop=stop) -> None:
                order.append(worker_id)
                await stop()

            process.stop = noted  # type: ignore[method-assign]
    assert order[0] == "router-1"
    assert sorted(order) == ["decode-1", "prefill-1", "router-1"]
    with pytest.raises(errors.NoWorkers):
        rig.controller.scale({"decode": 2})


async def test_a_bug_in_a_task_ends_the_controller_and_all_it_started():
    rig = Rig()

    async def broken(timeout_s: float) -> None:
        raise ZeroDivisionError

    task = asyncio.create_task(rig.controller.run())
    await rig.ready()
    rig.launcher.processes["decode-1"].drain = broken  # type: ignore[method-assign]
    rig.controller.scale({"decode": 0})
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(task, 30)
    assert all(process.dead for process in rig.launcher.processes.values())


@pytest_asyncio.fixture
async def operator() -> Iterator[tuple[Rig, operator_pb2_grpc.OperatorStub]]:
    async with Rig() as rig:
        ended = asyncio.Event()
        rig.task.add_done_callback(lambda _: ended.set())
        service = OperatorService(rig.controller, ended)
        server = await start_server(
            lambda server: operator_pb2_grpc.add_OperatorServicer_to_server(service, server), [SERVICE], "127.0.0.1", 0
        )
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield rig, operator_pb2_grpc.OperatorStub(channel)
        await server.stop()


async def test_the_operator_service_answers(operator):
    rig, stub = operator
    await rig.ready()
    answer = await stub.Status(operator_pb2.StatusRequest(), timeout=5)
    assert answer.ready
    assert answer.version
    scaled = await stub.Scale(operator_pb2.ScaleRequest(desired={"decode": 2}), timeout=5)
    assert {pool.pool: pool.desired for pool in scaled.pools} == {"prefill": 1, "decode": 2, "router": 1}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Scale(operator_pb2.ScaleRequest(desired={"gpu": 2}), timeout=5)
    assert isinstance(status.from_rpc_error(caught.value), errors.InvalidRequest)
    await stub.Shutdown(operator_pb2.ShutdownRequest(), timeout=10)
    assert all(process.dead for process in rig.launcher.processes.values())


async def test_page_stores_are_a_pool_that_only_a_cluster_with_a_host_cache_can_have():
    async with Rig(store={"host_gib": 1}, stores=2) as rig:
        await rig.ready()
        assert rig.launcher.living("store") == ["store-1", "store-2"]
        rig.controller.scale({"store": 1})
        await until(lambda: "drain" in rig.launcher.processes["store-2"].calls)
    async with Rig() as rig:
        await rig.ready()
        assert not [pool for pool in rig.controller.status().pools if pool.pool == "store"]
        with pytest.raises(errors.InvalidRequest, match="host-cache"):
            rig.controller.scale({"store": 1})

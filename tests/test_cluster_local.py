"""A local cluster as `diptych up` makes it: real Ray, real Valkey, a real (tiny) model. One cluster for all tests,
which go from gentle to rough.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import processes
from cluster.operator_client import OperatorClient
from cluster.state import StateFile, is_supervised
from diptych.client import Client
from protos.v1.operator_pb2 import WORKER_STATE_DRAINING
from tiny_model import make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

MAIN = [sys.executable, "-c", "from diptych.cli import main; main()"]
UP = ["up", "--port", "0", "--operator-port", "0", "--page-size", "16", "--num-pages", "64", "--dtype", "float32"]
PROMPT = list(range(3, 53))


def diptych(*arguments: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([*MAIN, *arguments], capture_output=True, text=True, timeout=200, check=False)
    assert "Traceback" not in done.stderr
    return done


def status() -> dict[str, Any]:
    done = diptych("status", "--json")
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def workers(pool: str) -> list[str]:
    return [worker["worker_id"] for found in status()["pools"] if found["pool"] == pool for worker in found["workers"]]


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, "did not come true"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateFile]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPTYCH_STATE", str(tmp_path_factory.mktemp("state")))
        patch.chdir(model.parent)
        done = diptych(*UP, "--model", model.name)  # relative: it must be found all the same
        file = StateFile("diptych")
        logs = "\n".join(path.read_text() for path in file.folder.rglob("*.err"))
        assert done.returncode == 0, done.stderr + logs
        state = file.read()
        assert state is not None
        assert f"{state.router}" in done.stdout
        yield file
        diptych("down")
        assert processes.find(Path(state.scratch)) == []


def answer(file: StateFile, tokens: int = 12) -> tuple[int, ...]:
    async def ask() -> tuple[int, ...]:
        async with Client(file.read().router) as client:
            done = await client.complete(token_ids=PROMPT, max_tokens=tokens, ignore_eos=True, deadline_s=60)
        return done.token_ids

    return asyncio.run(ask())


def test_it_answers_and_says_what_runs(cluster):
    said = status()
    assert said["ready"]
    assert said["redis_alive"]
    assert [len(pool["workers"]) for pool in said["pools"]] == [1, 1, 1]
    assert said["routers"] == [cluster.read().router]
    first = answer(cluster)
    assert len(first) == 12
    assert answer(cluster) == first
    done = diptych("generate", "hello", "--max-tokens", "8", "--stats")
    assert done.returncode == 0
    assert "prefill-1, decode-1" in done.stderr


def test_it_listens_on_loopback_only(cluster):
    state = cluster.read()
    for address in (state.router, state.operator, *(w["address"] for p in status()["pools"] for w in p["workers"])):
        assert address.startswith("127.0.0.1:")


def test_its_files_are_for_its_user_only(cluster):
    assert cluster.log.stat().st_mode & 0o077 == 0
    assert Path(cluster.read().scratch).stat().st_mode & 0o077 == 0


def test_a_second_one_of_the_same_name_is_refused(cluster, model):
    done = diptych(*UP, "--model", str(model))
    assert done.returncode == 3
    assert "up already" in done.stderr
    assert status()["ready"]


def test_a_taken_port_is_told_at_once(cluster, model):
    port = cluster.read().router.rpartition(":")[2]
    done = diptych("up", "--name", "second", "--port", port, "--model", str(model))
    assert done.returncode == 3
    assert f"127.0.0.1:{port}" in done.stderr
    assert StateFile("second").read() is None
    assert not is_supervised(StateFile("second"))


def test_a_shrinking_pool_finishes_what_it_has(cluster):
    expected = answer(cluster, tokens=900)

    def shrink() -> None:
        """Returns once the worker drains, with the stream still in it."""
        with OperatorClient(cluster.read().operator) as operator:
            operator.scale({"decode": 0})

            def leaving() -> list[tuple[int, int]]:
                return [(worker.state, worker.load.running) for worker in operator.status().pools[1].workers]

            until(lambda: leaving() == [(WORKER_STATE_DRAINING, 1)])

    async def stream_while_shrinking() -> list[int]:
        seen: list[int] = []
        async with Client(cluster.read().router) as client:
            async for chunk in client.generate(token_ids=PROMPT, max_tokens=900, ignore_eos=True, deadline_s=100):
                if not seen:
                    await asyncio.to_thread(shrink)
                seen += chunk.token_ids
        return seen

    assert tuple(asyncio.run(stream_while_shrinking())) == expected
    until(lambda: workers("decode") == [])
    assert workers("prefill") == ["prefill-1"]
    assert diptych("scale", "decode=1", "--wait").returncode == 0
    assert workers("decode") == ["decode-2"]
    assert answer(cluster) == expected[:12]


def test_killed_workers_are_replaced(cluster):
    expected = answer(cluster)
    for process in processes.find(Path(cluster.read().scratch)):
        if "WorkerActor" in "".join(process.cmdline()):
            process.kill()
    until(lambda: (workers("prefill"), workers("decode")) == (["prefill-2"], ["decode-3"]))
    until(lambda: status()["ready"])
    assert answer(cluster) == expected


def test_a_killed_router_comes_back_where_it_was(cluster):
    expected = answer(cluster)
    [router] = [p for p in processes.find(Path(cluster.read().scratch)) if "RouterActor" in "".join(p.cmdline())]
    router.kill()
    until(lambda: workers("router") == ["router-2"] and status()["ready"])
    assert answer(cluster) == expected


def test_a_killed_metadata_server_is_started_again(cluster):
    expected = answer(cluster)

    def servers() -> list[int]:
        return [p.pid for p in processes.find(Path(cluster.read().scratch)) if p.name().startswith("valkey")]

    before = servers()
    assert len(before) == 1
    os.kill(before[0], signal.SIGKILL)
    until(lambda: len(servers()) == 1 and servers() != before)
    until(lambda: status()["redis_alive"])
    assert answer(cluster) == expected


def test_a_killed_supervisor_leaves_nothing_that_serves_and_up_recovers(cluster):
    state = cluster.read()
    before = processes.find(Path(state.scratch))
    os.kill(state.pid, signal.SIGKILL)

    def left() -> list[psutil.Process]:
        """Two helpers of Ray's stay for a minute, trying to reach what is gone."""
        agents = ("ray::DashboardAg", "ray::RuntimeEnvA")  # as the kernel cuts their names
        return [p for p in processes.find(Path(state.scratch)) if not p.name().startswith(agents)]

    assert len(before) > 7
    until(lambda: left() == [], within_s=20)
    done = diptych("status")
    assert done.returncode == 4
    assert "no controller answers" in done.stderr
    # The next `up` ends what is left before it starts; this one then fails for want of a model.
    done = diptych(*UP, "--model", "no such model")
    assert done.returncode == 2
    assert "no such model" in done.stderr
    assert processes.find(Path(state.scratch)) == []
    assert not Path(state.scratch).exists()
    assert cluster.read() is None


def test_colocated_workers_serve_scale_and_are_replaced(cluster, model, monkeypatch):
    """Another cluster, now that the first is gone."""
    monkeypatch.setenv("DIPTYCH_CLUSTER", "colocated")
    done = diptych(*UP, "--mode", "colocated", "--model", str(model))
    assert done.returncode == 0, done.stderr
    file = StateFile("colocated")
    scratch = Path(file.read().scratch)
    try:
        assert [(pool["pool"], len(pool["workers"])) for pool in status()["pools"]] == [("colocated", 1), ("router", 1)]
        expected = answer(file)
        done = diptych("generate", "hello", "--max-tokens", "8", "--stats")
        assert "colocated-1" in done.stderr
        assert "handed over" in done.stderr
        [worker] = [p for p in processes.find(scratch) if "WorkerActor" in "".join(p.cmdline())]
        worker.kill()
        until(lambda: workers("colocated") == ["colocated-2"] and status()["ready"])
        assert answer(file) == expected
        assert diptych("scale", "colocated=2", "--wait").returncode == 0
        assert workers("colocated") == ["colocated-2", "colocated-3"]
        assert diptych("scale", "colocated=1", "--wait").returncode == 0
        assert answer(file) == expected
    finally:
        assert diptych("down").returncode == 0
    assert processes.find(scratch) == []

"""`diptych up --ray-address` on a Ray cluster of three raylets with a role each, as an operator would have it."""

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from cluster import ray_environment
from cluster.state import StateFile
from diptych.client import Client
from kvstore.valkey import EmbeddedValkey
from tiny_model import make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

MAIN = [sys.executable, "-c", "from diptych.cli import main; main()"]
# Ends its own nodes when its standard input closes. Never `ray stop`: that ends every Ray of the machine.
NODES = """
import sys
from ray.cluster_utils import Cluster
small = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=small)
for role in ("prefill", "decode"):
    cluster.add_node(num_cpus=0, object_store_memory=80 * 2**20, resources={role: 1})
cluster.wait_for_nodes(60)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


class RayCluster(NamedTuple):
    address: str
    process: psutil.Process
    metadata: EmbeddedValkey

    def actors(self) -> list[str]:
        """The names of our actors' processes."""
        names = []
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie too
                names.append("".join(child.cmdline()))
        return sorted(name.partition(".")[0] for name in names if name.startswith("ray::") and "Actor" in name)


def diptych(*arguments: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([*MAIN, *arguments], capture_output=True, text=True, timeout=200, check=False)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        scratch = Path(folder)  # short: Ray's sockets are below it
        (scratch / "ray").mkdir()
        patch.setenv("RAY_TMPDIR", str(scratch))
        for name, value in ray_environment.local_environment(scratch).items():  # its token is ours too
            patch.setenv(name, value)
        patch.setenv("DIPTYCH_STATE", str(scratch / "state"))
        with (scratch / "log").open("w") as log:
            nodes = subprocess.Popen(
                [sys.executable, "-P", "-c", NODES],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        process = psutil.Process(nodes.pid)
        with nodes, EmbeddedValkey("127.0.0.1") as metadata:
            address = nodes.stdout.readline().strip()
            assert address, (scratch / "log").read_text()
            yield RayCluster(address, process, metadata)
            children = process.children(recursive=True)
            nodes.stdin.close()
            nodes.wait(60)
            _, left = psutil.wait_procs(children, timeout=20)
            for child in left:
                child.kill()


def up(ray_cluster: RayCluster, model: Path, **options: str) -> "subprocess.CompletedProcess[str]":
    settings = {
        "ray-address": ray_cluster.address,
        "redis": ray_cluster.metadata.url,
        "model": str(model),
        "port": "0",
        "operator-port": "0",
        "page-size": "16",
        "num-pages": "64",
        "dtype": "float32",
        "timeout": "100",
    } | options
    return diptych("up", *(f"--{name}={value}" for name, value in settings.items()))


def test_up_to_down(ray_cluster, tmp_path):
    model = make_tiny_model(tmp_path / "tiny")
    done = up(ray_cluster, model)
    assert done.returncode == 0, done.stderr
    state = StateFile("diptych").read()
    assert (state.ray_address, state.pid, state.scratch) == (ray_cluster.address, 0, "")

    roles = ["ray::ControllerActor", "ray::RouterActor", "ray::WorkerActor", "ray::WorkerActor"]
    assert ray_cluster.actors() == roles
    said = status()
    assert said["ready"]
    password = ray_cluster.metadata.url.partition(":***@")[0].split(":")[2].partition("@")[0]
    assert len(password) > 8
    assert password not in json.dumps(said) + done.stdout + done.stderr + StateFile("diptych").path.read_text()
    nodes = {worker["node"] for pool in said["pools"] for worker in pool["workers"]}
    assert len(nodes) == 3  # the head has the router

    first = asyncio.run(answer(state.router))
    assert asyncio.run(answer(state.router)) == first

    again = up(ray_cluster, model)
    assert again.returncode == 3
    assert "already" in again.stderr

    assert diptych("scale", "prefill=2").returncode == 0
    wait_for_message("Ray's nodes offer 1 of 'prefill', 0 of it free")
    assert diptych("scale", "prefill=1", "--wait").returncode == 0

    assert diptych("down").returncode == 0
    assert StateFile("diptych").read() is None
    psutil.wait_procs(ray_cluster.process.children(recursive=True), timeout=0.1)
    give_up = time.monotonic() + 20
    while ray_cluster.actors():
        assert time.monotonic() < give_up, f"left: {ray_cluster.actors()}"
        time.sleep(0.1)


def test_a_start_that_fails_leaves_nothing_and_says_why(ray_cluster, tmp_path):
    done = up(ray_cluster, tmp_path / "nothing")
    assert done.returncode == 3
    assert "nothing" in done.stderr
    assert StateFile("diptych").read() is None
    give_up = time.monotonic() + 20
    while ray_cluster.actors():
        assert time.monotonic() < give_up, f"left: {ray_cluster.actors()}"
        time.sleep(0.1)


def test_a_metadata_server_that_is_down_is_told(ray_cluster, tmp_path, unused_tcp_port):
    done = up(ray_cluster, tmp_path, redis=f"redis://:hunter2@127.0.0.1:{unused_tcp_port}")
    assert done.returncode == 4
    assert str(unused_tcp_port) in done.stderr
    assert "hunter2" not in done.stderr


def test_no_ray_cluster_at_the_address_is_told_at_once(ray_cluster, tmp_path, unused_tcp_port):
    done = up(ray_cluster, tmp_path, **{"ray-address": f"127.0.0.1:{unused_tcp_port}"})
    assert done.returncode == 3
    assert "no Ray cluster answers" in done.stderr
    done = up(ray_cluster, tmp_path, **{"ray-address": "somewhere"})
    assert done.returncode == 3
    assert "HOST:PORT" in done.stderr


def status() -> dict[str, Any]:
    said: dict[str, Any] = json.loads(diptych("status", "--json").stdout)
    return said


def wait_for_message(text: str) -> None:
    give_up = time.monotonic() + 60
    while text not in json.dumps(status()):
        assert time.monotonic() < give_up, status()
        time.sleep(0.2)


async def answer(router: str) -> tuple[int, ...]:
    async with Client(router) as client:
        done = await client.complete(token_ids=range(3, 53), max_tokens=12, ignore_eos=True, deadline_s=60)
    return done.token_ids

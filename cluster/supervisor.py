"""The process that keeps a local cluster: its Ray, its metadata server, and the state file that commands read."""

import contextlib
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray

from cluster import processes, ray_session
from cluster.config import ClusterConfig
from cluster.ports import check_free
from cluster.state import ClusterState, Lock, StateFile
from engine import hub
from kvstore.valkey import EmbeddedValkey
from protos import errors

log = logging.getLogger(__name__)

_LOCK_S = 5.0  # commands hold the lock for an instant, to see whether anyone else does
_LOOK_S = 0.5


class Supervisor:
    """One local cluster, from its first phase to its end. What is written to the state file is what commands know."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._file = StateFile(config.name)
        self._watching = self._terminated = False
        self._scratch = processes.marked_folder()
        self._state = ClusterState(
            name=config.name, phase="starting", pid=os.getpid(), model=config.model, scratch=str(self._scratch)
        )

    def terminate(self, *_: object) -> None:
        """For SIGTERM. Where Ray waits in C it must not raise: there the loop looks."""
        if not self._watching:
            raise errors.Cancelled("the supervisor was ended by SIGTERM")
        self._terminated = True

    def run(self) -> int:
        """Bring the cluster up, keep it until it is shut down, take it down. The process's exit code."""
        with Lock(self._file) as lock:
            if not _patiently(lock):
                log.error("cluster %s has a supervisor already", self._config.name)
                return 1
            try:
                self._keep()
            except errors.DiptychError as error:
                log.error("%s", error)
                self._note(phase="failed", error_code=error.code, error=error.message)
                return 1
            except Exception as error:
                log.exception("ended")
                self._note(phase="failed", error_code="internal", error=f"{type(error).__name__}: {error}")
                return 1
            self._file.remove()
            return 0

    def _keep(self) -> None:
        config = self._config
        self._note(phase="starting", detail="checking the ports")
        host = config.host or "127.0.0.1"
        check_free(host, config.port)
        check_free(host, config.operator_port)
        self._note(phase="model", detail=config.model)
        hub.resolve(config.model, lambda text: self._note(detail=text), config.engine.load)
        with contextlib.ExitStack() as stack:
            metadata = None
            if config.redis is None:
                self._note(phase="metadata", detail="starting Valkey")
                metadata = stack.enter_context(EmbeddedValkey())
                config = config.model_copy(update={"redis": metadata.url})
            self._note(phase="ray", detail="starting Ray")
            stack.enter_context(self._ray())
            controller, operator = ray_session.start_controller(config, detached=False)
            self._note(phase="workers", detail="", operator=operator)
            self._watch(controller.closed.remote(), metadata)

    @contextlib.contextmanager
    def _ray(self) -> Iterator[None]:
        folder = self._scratch / "ray"
        try:
            ray_session.start_local(folder)
            signal.signal(signal.SIGTERM, self.terminate)  # Ray has put its own there
            yield
        finally:
            ray.shutdown()
            self._keep_logs(folder)

    def _watch(self, closed: "ray.ObjectRef[None]", metadata: EmbeddedValkey | None) -> None:
        """Until the controller has ended. Starts the metadata server again should it die."""
        self._watching = True
        while not ray.wait([closed], timeout=_LOOK_S)[0]:
            if self._terminated:
                raise errors.Cancelled("the supervisor was ended by SIGTERM")
            if metadata is not None and not psutil.pid_exists(metadata.pid):
                log.error("the metadata server died: starting it again")
                metadata.stop()
                metadata.start()
        ray.get(closed)

    def _keep_logs(self, folder: Path) -> None:
        """What workers and controller wrote, beside the supervisor's own log: Ray's folder goes with the cluster."""
        kept = self._file.folder / "logs"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(mode=0o700)
        for path in folder.glob("session_latest/logs/worker-*"):
            if path.stat().st_size:
                shutil.copyfile(path, kept / path.name.rpartition("-")[2])  # its pid

    def _note(self, **changes: str) -> None:
        self._state = self._state.model_copy(update=changes)
        log.info("%s %s", self._state.phase, self._state.detail)
        self._file.write(self._state)


def _patiently(lock: Lock) -> bool:
    give_up = time.monotonic() + _LOCK_S
    while not lock.acquire():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True


def main() -> int:
    """Started by `cluster.local`, in the folder and with the environment that it makes; the settings come on stdin."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    supervisor = Supervisor(ClusterConfig.model_validate_json(sys.stdin.read()))
    signal.signal(signal.SIGTERM, supervisor.terminate)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())

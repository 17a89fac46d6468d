"""Bringing a local cluster up and taking it down. Both block; `show` is told each step."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from cluster import processes, ray_environment
from cluster.config import ClusterConfig
from cluster.operator_client import OperatorClient
from cluster.ready import Show, wait_ready
from cluster.state import ClusterState, StateFile, is_supervised
from engine import hub
from protos import errors
from protos.v1 import common_pb2
from rpc import status

_POLL_S = 0.1
_PATIENCE_S = 3.0  # for processes that end by themselves once the supervisor has
_END_S = 30.0  # for a supervisor to end
_LOG_LINES = 12
_MAX_TMP = 24  # bytes of the temporary folder's path: Ray's sockets below it may have 107


def bring_up(config: ClusterConfig, deadline_s: float, show: Show) -> ClusterState:
    """Start a supervisor and wait until the cluster is ready. On any error, Ctrl-C included, nothing is left running.

    Raises `FixTheSetup` where it is up already or cannot start, `DeadlineExceeded` after `deadline_s`.
    """
    file = StateFile(config.name)
    _refuse_second(file)
    _sweep(file)
    give_up = time.monotonic() + deadline_s
    scratch = _make_scratch()
    try:
        supervisor = _launch(config, file, scratch)
        state = _wait_controller(file, scratch, supervisor, give_up, show)
        router = wait_ready(state.operator, give_up, show)
    except BaseException as error:
        if _own_state(file, scratch):
            take_down(file, show)
        _clear(scratch)
        if isinstance(error, errors.DiptychError):
            error.message = f"{error.message}\n{_log_hint(file, error)}"
        raise
    ready = state.model_copy(update={"phase": "ready", "router": router})
    file.write(ready)  # the supervisor has written its last word, unless it fails
    return ready


def take_down(file: StateFile, show: Show) -> bool:
    """End a local cluster and make sure that no process of it is left. False where there was none.

    Raises `FixTheSetup` where a process survives.
    """
    state = file.read()
    if is_supervised(file):
        state = _wait_state(file)
        show("down", "routers and workers")
        asked = bool(state.operator) and _ask(state.operator)
        show("down", "ray and metadata")
        if not asked or not _wait_free(file, _END_S):
            _signal(state.pid, signal.SIGTERM)
        if not _wait_free(file, _END_S):
            _signal(state.pid, signal.SIGKILL)
            _wait_free(file, _END_S)
    if state is None:
        return False
    _clear(Path(state.scratch))
    file.remove()
    return True


def _own_state(file: StateFile, scratch: Path) -> ClusterState | None:
    """What our supervisor has written; None where another `up` was faster and the file is of its cluster."""
    state = file.read()
    return state if state is not None and state.scratch == str(scratch) else None


def _refuse_second(file: StateFile) -> None:
    state = file.read()
    if is_supervised(file) or (state is not None and state.ray_address):
        raise errors.FixTheSetup(
            f"cluster {file.name!r} is up already: see `diptych status`, take it down with `diptych down`, or choose "
            "another --name",
            stage="up",
        )


def _sweep(file: StateFile) -> None:
    """End and forget what a supervisor that was killed has left."""
    state = file.read()
    if state is not None:
        _clear(Path(state.scratch), patience_s=0.0)
        file.remove()


def _clear(scratch: Path, patience_s: float = _PATIENCE_S) -> None:
    if not scratch.is_absolute():
        raise ValueError(f"{scratch} is no cluster's folder")
    processes.end(scratch, patience_s)
    shutil.rmtree(scratch, ignore_errors=True)


def _make_scratch() -> Path:
    tmp = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="diptych-", dir=tmp if len(tmp) <= _MAX_TMP else "/tmp"))


def _launch(config: ClusterConfig, file: StateFile, scratch: Path) -> "subprocess.Popen[bytes]":
    environment = os.environ | processes.mark(scratch) | ray_environment.local_environment(scratch)
    # What is relative here would be elsewhere there.
    environment |= {"DIPTYCH_STATE": str(file.folder.parent), "DIPTYCH_CACHE": str(hub.cache_dir().absolute())}
    if os.path.exists(config.model):
        config = config.model_copy(update={"model": os.path.abspath(config.model)})
    with file.log.open("wb") as log:
        file.log.chmod(0o600)
        # -P and a folder of its own: folders of the user's that are named as our packages must not be imported.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cluster.supervisor"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment | {"TMPDIR": str(scratch)},
            cwd=scratch,
            start_new_session=True,
        )
    threading.Thread(target=process.wait, daemon=True).start()  # reaps it, where this process lives longer
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(config.model_dump_json().encode())  # not as an argument: it may hold a password
    return process


def _wait_controller(
    file: StateFile, scratch: Path, supervisor: "subprocess.Popen[bytes]", give_up: float, show: Show
) -> ClusterState:
    """Follow the supervisor's state file until the controller listens."""
    shown = ("starting", "")
    while True:
        ended = supervisor.poll()  # before reading: what it wrote last is then there
        state = _own_state(file, scratch)
        if state is not None:
            shown = (state.phase, state.detail)
            if state.error:
                raise status.from_detail(common_pb2.ErrorDetail(code=state.error_code, message=state.error))
            if state.operator:
                return state
        if ended is not None:
            raise errors.DiptychError(f"the supervisor ended with code {ended}", stage="start")
        show(*shown)
        if time.monotonic() > give_up:
            raise errors.DeadlineExceeded(f"the cluster is not ready in time: {': '.join(shown)}", stage="start")
        time.sleep(_POLL_S)


def _wait_state(file: StateFile) -> ClusterState:
    """What a living supervisor has written; it does so at once when it starts."""
    give_up = time.monotonic() + _PATIENCE_S
    while (state := file.read()) is None:
        if time.monotonic() > give_up:
            raise errors.FixTheSetup(f"a supervisor holds {file.folder} but says nothing: end it by hand")
        time.sleep(_POLL_S)
    return state


def _ask(operator: str) -> bool:
    try:
        with OperatorClient(operator) as client:
            client.shutdown()
    except errors.DiptychError:  # no controller any more: its supervisor is ended by a signal
        return False
    return True


def _wait_free(file: StateFile, timeout_s: float) -> bool:
    give_up = time.monotonic() + timeout_s
    while is_supervised(file):
        if time.monotonic() > give_up:
            return False
        time.sleep(_POLL_S)
    return True


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _log_hint(file: StateFile, error: errors.DiptychError) -> str:
    """Where the logs are; their last lines as well where the error does not say what to change."""
    hint = f"logs: {file.log} and {file.folder / 'logs'}"
    if isinstance(error, errors.FixTheSetup | errors.FixTheRequest) or not file.log.exists():
        return hint
    lines = file.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join([hint, *(f"  {line}" for line in lines)])

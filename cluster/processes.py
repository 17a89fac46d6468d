"""Finding and ending what is left of a local cluster, by the private folder that all its processes know."""

import os
import time
from pathlib import Path

import psutil

from protos import errors

_VARIABLE = "DIPTYCH_SCRATCH"
_TERM_S = 3.0
_KILL_S = 5.0


def mark(scratch: Path) -> dict[str, str]:
    """For the environment of a supervisor, and so of all that it starts."""
    return {_VARIABLE: str(scratch)}


def marked_folder() -> Path:
    """The folder of the cluster that this process belongs to."""
    return Path(os.environ[_VARIABLE])


def find(scratch: Path) -> list[psutil.Process]:
    """The living processes of the cluster with this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and _belongs(process, str(scratch)):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone meanwhile, or another user's
            continue
    return found


def _belongs(process: psutil.Process, scratch: str) -> bool:
    environment = process.environ()
    if environment.get(_VARIABLE) == scratch:
        return True
    # Valkey and Ray's helpers write their titles over their environment, but stay where the supervisor began.
    # A user's shell may be there too: it has an environment.
    return "PATH" not in environment and Path(process.cwd()).is_relative_to(scratch)


def end(scratch: Path, patience_s: float) -> None:
    """Leave none: wait `patience_s` for those that end by themselves, then end the others by their ids.

    Raises `FixTheSetup` naming those that survive.
    """
    give_up = time.monotonic() + patience_s
    while (left := find(scratch)) and time.monotonic() < give_up:
        psutil.wait_procs(left, timeout=0.1)
    _signal(left, "terminate", _TERM_S)
    _signal(find(scratch), "kill", _KILL_S)
    if left := find(scratch):
        names = ", ".join(f"{process.pid} ({process.name()})" for process in left)
        raise errors.FixTheSetup(f"these processes of the cluster could not be ended: {names}", stage="down")


def _signal(processes: list[psutil.Process], how: str, wait_s: float) -> None:
    for process in processes:
        try:
            getattr(process, how)()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=wait_s)

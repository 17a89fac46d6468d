"""What is known on this machine about a cluster that was brought up from it: one small file and one lock a cluster."""

import fcntl
import os
from pathlib import Path
from typing import Self

import platformdirs
from pydantic import BaseModel, ValidationError

from protos import errors


class ClusterState(BaseModel):
    """Written by whoever brings the cluster up; read by every command after it."""

    name: str
    phase: str  # starting, model, metadata, ray, workers, ready or failed
    detail: str = ""  # within the phase: what is being done
    pid: int = 0  # the supervisor's; 0: an existing Ray cluster runs it
    model: str = ""
    router: str = ""  # host:port that clients call
    operator: str = ""
    ray_address: str = ""
    scratch: str = ""  # private temporary folder of a local cluster; no other cluster ever has the same
    error_code: str = ""  # of a failed start
    error: str = ""


class StateFile:
    """The state of the cluster `name` under $DIPTYCH_STATE, or the user's state folder."""

    def __init__(self, name: str) -> None:
        root = os.environ.get("DIPTYCH_STATE") or platformdirs.user_state_dir("diptych")
        self.name = name
        self.folder = Path(root).expanduser().absolute() / name
        self.path = self.folder / "state.json"
        self.log = self.folder / "supervisor.log"

    def read(self) -> ClusterState | None:
        """The state, or None where no cluster of that name was brought up from here."""
        try:
            return ClusterState.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise errors.FixTheSetup(f"cannot read {self.path}: remove it if no cluster runs", stage="state") from error

    def write(self, state: ClusterState) -> None:
        """Replace the file in one step, readable by this user only."""
        self.make_folder()
        beside = self.path.with_suffix(f".{os.getpid()}.new")
        beside.write_text(state.model_dump_json(indent=1), encoding="utf-8")
        beside.chmod(0o600)
        beside.replace(self.path)

    def remove(self) -> None:
        """Forget the cluster; its log stays."""
        self.path.unlink(missing_ok=True)

    def make_folder(self) -> None:
        """Create the folder, for this user only."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise errors.FixTheSetup(
                f"cannot create {self.folder}: {error.strerror}; set DIPTYCH_STATE to a folder that can be written",
                stage="state",
            ) from error


class Lock:
    """Held by a local cluster's supervisor while it lives: the kernel lets go of it, whatever ends the process."""

    def __init__(self, file: StateFile) -> None:
        file.make_folder()
        # Not inherited by children: a lock that outlived the supervisor would say that it lives.
        self._fd = os.open(file.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self) -> bool:
        """Take it, or say at once that another process has it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_supervised(file: StateFile) -> bool:
    """Whether a supervisor of this cluster is alive on this machine."""
    with Lock(file) as lock:
        return not lock.acquire()

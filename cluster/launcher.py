"""The seam between the controller and what runs processes: Ray in earnest, a fake in tests."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from protos.v1 import worker_pb2


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    node: str
    pid: int


class Process(ABC):
    """One worker or router in a process of its own. Every call raises a typed error, `WorkerLost` when it is gone."""

    @abstractmethod
    async def place(self) -> Place:
        """Wait until the process runs, and say where."""

    @abstractmethod
    async def why_waiting(self) -> str:
        """Why it may still have no place."""

    @abstractmethod
    async def progress(self) -> str:
        """What its start is doing, in a few words."""

    @abstractmethod
    async def start(self) -> str:
        """Load what it needs and serve; the address (host:port) that it listens on."""

    @abstractmethod
    async def device(self) -> str:
        """What it computes on, once it has started; empty for a router."""

    @abstractmethod
    async def lost(self) -> str:
        """Wait for the end of the process, and say why it ended."""

    @abstractmethod
    async def probe(self, address: str, timeout_s: float) -> worker_pb2.WorkerLoad:
        """Ask the service itself. A router answers with an empty load."""

    @abstractmethod
    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and wait until nothing is left to finish. Raises `DeadlineExceeded`."""

    @abstractmethod
    async def stop(self) -> None:
        """End the service in good order; the process stays until `kill`."""

    @abstractmethod
    async def kill(self) -> None:
        """End the process. It may be gone already."""


class Launcher(ABC):
    """Starts processes."""

    @abstractmethod
    def launch(self, pool: str, worker_id: str, port: int) -> Process:
        """Ask for a process of this pool that will listen on `port` (0: any free one); returns at once."""

"""The controller's seam without processes: a test says what each of them does."""

import asyncio
import itertools

from cluster.launcher import Launcher, Place, Process
from protos import errors
from protos.v1 import worker_pb2

_ports = itertools.count(4711)


class FakeProcess(Process):
    """Starts at once and lives until told otherwise. Set the attributes to make it misbehave."""

    def __init__(self, worker_id: str, port: int) -> None:
        self.worker_id = worker_id
        self.port = port or next(_ports)
        self.placed = asyncio.Event()
        self.placed.set()
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.drained = asyncio.Event()  # nothing is left to finish
        self.start_error: errors.DiptychError | None = None
        self.load = worker_pb2.WorkerLoad()
        self.silent = False  # the service answers no probe
        self.calls: list[str] = []
        self._end = asyncio.Event()
        self._reason = ""

    def die(self, reason: str) -> None:
        """The process ends."""
        self._reason = reason
        self._end.set()

    @property
    def dead(self) -> bool:
        """Whether it has died or was killed."""
        return self._end.is_set()

    async def place(self) -> Place:
        await self._unless_dead(self.placed)
        return Place("node-1", 1)

    async def why_waiting(self) -> str:
        return "no node is large enough"

    async def progress(self) -> str:
        return "loading the model"

    async def start(self) -> str:
        await self._unless_dead(self.may_start)
        if self.start_error is not None:
            raise self.start_error
        return f"{self.worker_id}:{self.port}"

    async def device(self) -> str:
        return "cpu"

    async def lost(self) -> str:
        await self._end.wait()
        return self._reason

    async def probe(self, address: str, timeout_s: float) -> worker_pb2.WorkerLoad:
        if self.silent or self.dead:
            raise errors.WorkerLost("no answer")
        return self.load

    async def drain(self, timeout_s: float) -> None:
        self.calls.append("drain")
        await self._unless_dead(self.drained)

    async def stop(self) -> None:
        self.calls.append("stop")

    async def kill(self) -> None:
        self.calls.append("kill")
        self._end.set()

    async def _unless_dead(self, event: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()), asyncio.create_task(self._end.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.dead:
            raise errors.WorkerLost(self._reason or "killed")


class FakeLauncher(Launcher):
    """Keeps every process it made, by id. `prepare` may change one before the controller sees it."""

    def __init__(self) -> None:
        self.processes: dict[str, FakeProcess] = {}

    def prepare(self, process: FakeProcess) -> None:
        """Tests replace this."""

    def launch(self, pool: str, worker_id: str, port: int) -> FakeProcess:
        process = self.processes[worker_id] = FakeProcess(worker_id, port)
        self.prepare(process)
        return process

    def living(self, pool: str) -> list[str]:
        """The ids of the pool's living processes, oldest first."""
        return [id_ for id_, process in self.processes.items() if id_.startswith(pool) and not process.dead]

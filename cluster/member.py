"""One worker or router that the controller started, from its launch to its end."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from cluster.launcher import Process
from cluster.reconcile import Phase, WorkerView
from protos import errors
from protos.v1 import operator_pb2, worker_pb2

log = logging.getLogger(__name__)

_PLACE_S = 120.0  # to find a node with the resource and start a process there
_PATIENCE_S = 3.0  # before asking why there is still no place
_STOP_S = 10.0
_KILL_S = 5.0
_PROBE_S = 2.0
_STATES = {
    Phase.STARTING: operator_pb2.WORKER_STATE_STARTING,
    Phase.READY: operator_pb2.WORKER_STATE_READY,
    Phase.DRAINING: operator_pb2.WORKER_STATE_DRAINING,
    Phase.STOPPING: operator_pb2.WORKER_STATE_DRAINING,
}


class Member:
    """Its state, and the calls that change it."""

    def __init__(self, pool: str, worker_id: str, number: int, process: Process) -> None:
        self.pool = pool
        self.worker_id = worker_id
        self.number = number
        self.phase = Phase.STARTING
        self.since = time.monotonic()
        self.message = "waiting for a place"
        self.address = ""
        self.node = ""
        self.device = ""
        self.load = worker_pb2.WorkerLoad()
        self.idle = False
        self.answers = False  # the service itself, when last asked
        self._process = process

    async def live(self, start_timeout_s: float) -> None:
        """Start, then wait for the end of the process. Always ends in a typed error that says why."""
        async with _limit(_PLACE_S, "no node had room for it"):
            place = await self._process.place()
        self.node = place.node
        self.message = "starting"
        async with _limit(start_timeout_s, "its start took too long"):
            self.address = await self._process.start()
            self.device = await self._process.device()
        self.enter(Phase.READY)
        log.info("%s is ready at %s on %s (pid %d)", self.worker_id, self.address, place.node, place.pid)
        raise errors.WorkerLost(await self._process.lost())

    async def look(self) -> None:
        """Ask it how it is; what it cannot say is left as it was."""
        try:
            if self.phase is Phase.STARTING:
                async with _limit(_PROBE_S, "no answer"):
                    self.message = await self._starting()
            elif self.phase in (Phase.READY, Phase.DRAINING):
                self.load = await self._process.probe(self.address, _PROBE_S)
                self.answers, self.message = True, ""
        except errors.DiptychError as error:
            self.answers = False
            if self.phase in (Phase.READY, Phase.DRAINING):
                self.message = f"does not answer: {error.message}"

    async def _starting(self) -> str:
        if self.node:
            return await self._process.progress() or "starting"
        if time.monotonic() - self.since < _PATIENCE_S:
            return self.message
        return f"waiting for a place: {await self._process.why_waiting()}"

    async def drain(self, timeout_s: float) -> None:
        """Let it finish what it has. Idle afterwards: nothing is left, or there is no use in waiting."""
        try:
            await self._process.drain(timeout_s)
        except errors.DiptychError as error:
            if self.phase is Phase.DRAINING:  # else the whole cluster ends meanwhile
                log.warning("%s is stopped with work left: %s", self.worker_id, error)
        self.idle = True

    async def stop(self) -> None:
        """End the service in good order if it can be had, then the process."""
        if self.address:
            try:
                async with _limit(_STOP_S, "its stop took too long"):
                    await self._process.stop()
            except errors.DiptychError as error:
                log.warning("%s did not stop in good order: %s", self.worker_id, error)
        await self.kill()

    async def kill(self) -> None:
        """End the process, whatever it does."""
        try:
            async with _limit(_KILL_S, "its process could not be ended"):
                await self._process.kill()
        except errors.DiptychError as error:
            log.warning("%s: %s", self.worker_id, error)

    def view(self) -> WorkerView:
        """What reconciling looks at."""
        load = self.load.running + self.load.waiting
        return WorkerView(self.worker_id, self.number, self.phase, self.since, load, self.idle)

    def status(self) -> operator_pb2.WorkerStatus:
        """What operators look at."""
        return operator_pb2.WorkerStatus(
            worker_id=self.worker_id,
            address=self.address,
            node=self.node,
            state=_STATES[self.phase],
            message=self.message,
            load=self.load,
            device=self.device,
        )

    def enter(self, phase: Phase) -> None:
        """Move to `phase` now."""
        message = "stopping" if phase is Phase.STOPPING else ""
        self.phase, self.since, self.message = phase, time.monotonic(), message


@contextlib.asynccontextmanager
async def _limit(seconds: float, message: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise errors.WorkerLost(f"{message} ({seconds:.0f} s)") from error

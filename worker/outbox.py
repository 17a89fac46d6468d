"""What a worker has to say to one router."""

import asyncio
from collections.abc import Iterable

from protos.v1 import worker_pb2

_STEP_BYTES = 4 * 1024 * 1024  # well below what gRPC is told to carry


class Outbox:
    """Updates wait here until the stream takes them, all at once.

    A router that reads slower than the engine steps gets larger messages, not more of them; what waits is bounded
    by the tokens that its running requests may still produce.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready = asyncio.Event()
        self._updates: list[worker_pb2.SequenceUpdate] = []
        self._load = worker_pb2.WorkerLoad()
        self._closed = False

    def post(self, updates: Iterable[worker_pb2.SequenceUpdate], load: worker_pb2.WorkerLoad) -> None:
        """Add updates; callable from any thread."""
        self._loop.call_soon_threadsafe(self._add, list(updates), load)

    def close(self) -> None:
        """The router hangs up: nobody will take anything more."""
        self._closed = True
        self._ready.set()

    async def take(self) -> worker_pb2.Step | None:
        """What waits, as one message of bounded size, as soon as there is something; None once it is closed."""
        await self._ready.wait()
        if self._closed:
            return None
        count = len(self._updates)
        step = worker_pb2.Step(updates=self._updates, load=self._load)
        while step.ByteSize() > _STEP_BYTES and count > 1:  # log-probabilities can be large
            count //= 2
            step = worker_pb2.Step(updates=self._updates[:count], load=self._load)
        del self._updates[:count]
        if not self._updates:
            self._ready.clear()
        return step

    def _add(self, updates: list[worker_pb2.SequenceUpdate], load: worker_pb2.WorkerLoad) -> None:
        self._updates += updates
        self._load = load
        self._ready.set()

"""The one stream to one life of one worker."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

import grpc
import grpc.aio

from kvstore.directory import WorkerRecord
from kvstore.keys import PageKey
from protos import errors
from protos.v1 import worker_pb2, worker_pb2_grpc
from rpc import status
from rpc.server import CHANNEL_OPTIONS

log = logging.getLogger(__name__)

OUTBOX_MESSAGES = 8192  # a worker that leaves so many unread is not alive
# A worker answers between two steps of its engine, and a step of a long prompt can take seconds on a small machine.
CONNECT_S = 10.0  # to the worker's first message
PROBE_S = 3.0
REST = 0.25  # of the time that passing updates on took, in which the next ones gather
RETRY_S = (0.1, 0.2, 0.5, 1.0)  # pauses between attempts to connect; the last one repeats

Name = tuple[str, int]  # worker id, incarnation

_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]


class Listener(Protocol):
    """A request that a worker reports to. `pool` is the worker's."""

    def update(self, pool: str, update: worker_pb2.SequenceUpdate) -> None: ...

    def lost(self, pool: str, error: errors.DiptychError) -> None: ...


@dataclass(frozen=True)
class Claim:
    """What one request asked of a worker, for placement to count until the worker's own load shows it."""

    listener: Listener
    tokens: int  # of the prompt, to be computed there
    pages: int
    keys: Sequence[PageKey] = ()  # of the pages that are filled there, or held already
    at: float = field(default_factory=monotonic)


@dataclass(frozen=True)
class TimedLoad:
    load: worker_pb2.WorkerLoad
    at: float  # monotonic seconds


class WorkerLink:
    """Keeps a `Connect` stream open until `stop`, and tells requests at once when it breaks.

    Requests are known by their wire id, which no other request or attempt has had.
    """

    def __init__(self, record: WorkerRecord, router_id: str) -> None:
        self.record = record
        self.recorded_at = monotonic()
        self.description: worker_pb2.WorkerDescription | None = None  # while the stream lives
        self.step_load: TimedLoad | None = None
        self.claims: dict[str, Claim] = {}
        self._router_id = router_id
        self._outbox: asyncio.Queue[worker_pb2.RouterMessage] = asyncio.Queue(OUTBOX_MESSAGES)
        self._heard: list[worker_pb2.SequenceUpdate] = []  # and not passed on yet
        self._resting: asyncio.Handle | None = None  # when it ends, what was heard meanwhile is passed on
        self._broken = asyncio.Event()
        self._reason = ""
        self._stub: worker_pb2_grpc.WorkerStub | None = None
        self._task = asyncio.create_task(self._keep_open(), name=f"link to {record.worker_id}")

    @property
    def name(self) -> Name:
        return self.record.worker_id, self.record.incarnation

    @property
    def live(self) -> bool:
        return self.description is not None

    def renew(self, record: WorkerRecord) -> None:
        """Take what the directory says of the worker now."""
        self.record = record
        self.recorded_at = monotonic()

    def listen(self, wire_id: str, claim: Claim) -> None:
        """Report what the worker says about this id. Raises `WorkerLost` where the stream is down."""
        if not self.live:
            raise self._lost("is not connected")
        self.claims[wire_id] = claim

    def forget(self, wire_id: str) -> None:
        """Stop reporting. Does nothing for an id that is not known."""
        self.claims.pop(wire_id, None)

    def send(self, message: worker_pb2.RouterMessage) -> None:
        """Queue a message; never waits. It is dropped where the stream is down: then the worker forgets us anyway."""
        if not self.live:
            return
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            self.break_off("does not read what it is sent")

    def break_off(self, reason: str) -> None:
        """Give up the present stream; a new one is tried."""
        self._reason = reason
        self._broken.set()

    async def probe(self) -> bool:
        """Whether the worker answers a call within `PROBE_S`, in the life that this link is for."""
        if self._stub is None:
            return False
        try:
            answer = await self._stub.Describe(worker_pb2.DescribeRequest(), timeout=PROBE_S)
        except grpc.aio.AioRpcError:
            return False
        except asyncio.CancelledError:  # also what a call raises whose channel closes
            if _being_cancelled():
                raise
            return False
        return bool(answer.incarnation == self.record.incarnation)

    async def stop(self, reason: str) -> None:
        """Close the stream; the requests that listen are told."""
        self._reason = reason
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _keep_open(self) -> None:
        failures = 0
        while True:
            try:
                await self._session()
                failures = 0
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, errors.DiptychError, TimeoutError) as error:
                log.debug("no stream to %s at %s: %r", self.record.worker_id, self.record.address, error)
                failures += 1
            except Exception:  # a link that gave up would lose its worker for good
                log.exception("the link to %s failed", self.record.worker_id)
                failures += 1
            await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])

    async def _session(self) -> None:
        """One stream, from its opening to its end. Raises only where it could not be opened."""
        async with self._open() as (call, description):
            self.description = description
            self.step_load = TimedLoad(description.load, monotonic())
            log.info("connected to %s at %s", self.record.worker_id, self.record.address)
            tasks = {
                asyncio.create_task(self._read(call)),
                asyncio.create_task(self._write(call)),
                asyncio.create_task(self._broken.wait()),
            }
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._down()
                await _end(tasks)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[tuple[Any, worker_pb2.WorkerDescription]]:
        async with grpc.aio.insecure_channel(self.record.address, options=_OPTIONS) as channel:
            self._stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                call = self._stub.Connect()
                async with asyncio.timeout(CONNECT_S):
                    hello = worker_pb2.Hello(router_id=self._router_id)
                    await call.write(worker_pb2.RouterMessage(hello=hello))
                    first = await call.read()
                yield call, self._checked(first)
            finally:
                self._stub = None

    def _checked(self, first: Any) -> worker_pb2.WorkerDescription:
        """The description that opens a stream, of the life that the directory named."""
        if first is grpc.aio.EOF or first.WhichOneof("kind") != "hello":
            raise self._lost("did not say hello")
        if first.hello.incarnation != self.record.incarnation:
            raise self._lost("has restarted")
        description: worker_pb2.WorkerDescription = first.hello
        return description

    async def _read(self, call: Any) -> None:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if message.WhichOneof("kind") == "step":
                    self._hear(message.step)
        except grpc.aio.AioRpcError as error:
            self._reason = self._reason or f"broke the stream: {status.from_rpc_error(error).message}"

    async def _write(self, call: Any) -> None:
        try:
            while True:
                await call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:  # the latter: the call has ended
            log.debug("the stream to %s takes no more: %r", self.record.worker_id, error)

    def _hear(self, step: worker_pb2.Step) -> None:
        """Pass a step's updates on: at once, unless the router is busy with the last ones or has just been. Then they
        gather, so that clients get fewer messages where there would be more than it can send.
        """
        if step.HasField("load"):
            self.step_load = TimedLoad(step.load, monotonic())
        self._heard += step.updates
        if self._resting is None:
            self._pass_on()

    def _pass_on(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        heard, self._heard = self._heard, []
        for update in heard:
            if claim := self.claims.get(update.request_id):  # late words on a request that is over find nobody
                claim.listener.update(self.record.pool, update)
        # The streams that were given something send it before that.
        self._resting = loop.call_soon(self._rest, began) if heard else None

    def _rest(self, began: float) -> None:
        loop = asyncio.get_running_loop()
        self._resting = loop.call_later(REST * (loop.time() - began), self._pass_on)

    def _down(self) -> None:
        """The stream is over: whoever listens is told, and what was not sent is of no use to a new stream."""
        if self._resting is not None:
            self._resting.cancel()
        self._pass_on()
        self.description = None
        reason, self._reason = self._reason or "ended the stream", ""
        log.info("%s %s (%d requests)", self.record.worker_id, reason, len(self.claims))
        self._broken.clear()
        self._outbox = asyncio.Queue(OUTBOX_MESSAGES)
        claims, self.claims = self.claims, {}
        for claim in claims.values():
            claim.listener.lost(self.record.pool, self._lost(reason))

    def _lost(self, what: str) -> errors.WorkerLost:
        return errors.WorkerLost(f"{self.record.pool} worker {self.record.worker_id} {what}", stage=self.record.pool)


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            log.error("a worker's stream failed", exc_info=error)

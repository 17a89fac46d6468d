"""A worker without an engine: the `Worker` service in this process, doing what a test tells it to."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Self

import grpc.aio

from kvstore.directory import WorkerRecord
from kvstore.keys import TOKEN_BYTES, unpack_tokens
from kvstore.memory_directory import MemoryDirectory
from kvstore.page_format import PageFormat
from protos import errors
from protos.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from rpc import status
from rpc.server import RpcServer, start_server

PAGE_SIZE = 16
FORMAT = PageFormat(layers=2, kv_heads=2, page_size=PAGE_SIZE, head_dim=16, dtype="float32")
LEASE_S = 3600.0  # tests end leases themselves
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH

_incarnations = itertools.count(1)

Answer = Callable[[list[int]], list[int]]  # prompt ids to answer ids, as long as may be wanted
Script = Callable[["FakeWorker", Any], Awaitable[None]]


def echo(prompt: list[int]) -> list[int]:
    """An answer that depends on every prompt token, and whose every token differs from its neighbours."""
    start = sum(index * token for index, token in enumerate(prompt, 1))
    return [3 + (start + 7 * step) % 250 for step in range(4096)]


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """`script` runs for each Prefill (or Start), in a task that a Cancel ends; the default answers as a worker does.

    `messages` keeps all that routers sent. `held` are the wire ids for which it would hold pages.
    """

    def __init__(self, pool: str, directory: MemoryDirectory, *, answer: Answer = echo, **record: Any) -> None:
        self.directory = directory
        self.answer = answer
        scripts = {"prefill": serve_prefill, "decode": serve_decode, "colocated": serve_colocated}
        self.script: Script = scripts[pool]
        self.pause_s = 0.0  # before each token of an answer
        self.messages: list[worker_pb2.RouterMessage] = []
        self.held: dict[str, worker_pb2.Prefill | worker_pb2.Decode] = {}
        self.port = 0  # any free one
        self.frozen = False  # answers nothing, as a stopped process
        self.load = worker_pb2.WorkerLoad(total_pages=1000, available_pages=1000, tokens_per_s=10_000.0, step_ms=5.0)
        fields = {
            "worker_id": f"{pool}-0",
            "incarnation": next(_incarnations),
            "pool": pool,
            "address": "",
            "model": "model",
            "fingerprint": "weights",
            "format": FORMAT,
            "max_tokens": 16_000,
            "endpoints": (("shm", "/nowhere"),),
        }
        self.record = WorkerRecord(**(fields | record))
        self._queued: dict[str, int] = {}  # prompt tokens that are still to be computed
        self._steps: list[asyncio.Queue[worker_pb2.Step | None]] = []  # one for each stream
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._server: RpcServer | None = None

    # Its life

    async def start(self) -> Self:
        def register(server: grpc.aio.Server) -> None:
            worker_pb2_grpc.add_WorkerServicer_to_server(self, server)

        self._server = await start_server(register, [], "127.0.0.1", self.port)
        self.record = replace(self.record, address=self._server.address)
        self.announce()
        return self

    def announce(self, **changes: Any) -> None:
        """Write the record, with changes, to the directory."""
        self.record = replace(self.record, **changes)
        self.directory.renew(self.record, LEASE_S)

    def lose_lease(self) -> None:
        self.directory.deregister(self.record.worker_id, self.record.incarnation)

    async def die(self) -> None:
        """Cut every stream, as kill -9 does; the lease runs on."""
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        self.held.clear()
        if self._server is not None:
            await self._server.stop(grace_s=0)
            self._server = None

    # What a script says

    async def say(self, wire_id: str, **fields: Any) -> None:
        """Send one update to every router that is connected."""
        if fields.get("token_ids"):
            self._queued.pop(wire_id, None)
        step = worker_pb2.Step(
            updates=[worker_pb2.SequenceUpdate(request_id=wire_id, **fields)], load=self._present_load()
        )
        for steps in self._steps:
            steps.put_nowait(step)

    async def refuse(self, wire_id: str, error: errors.DiptychError) -> None:
        self.held.pop(wire_id, None)
        await self.say(wire_id, error=status.to_detail(error))

    # What a test asks

    def said(self, kind: str) -> list[Any]:
        """All messages of one kind, such as "cancel", in order."""
        return [getattr(message, kind) for message in self.messages if message.WhichOneof("kind") == kind]

    async def hears(self, kind: str, count: int = 1, within_s: float = 5.0) -> Any:
        """Wait for the `count`-th message of a kind."""
        end = time.monotonic() + within_s
        while len(self.said(kind)) < count:
            assert time.monotonic() < end, f"heard only {self.messages}"
            await asyncio.sleep(0.005)
        return self.said(kind)[count - 1]

    # The service

    async def Connect(
        self, messages: AsyncIterator[worker_pb2.RouterMessage], context: Any
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        steps: asyncio.Queue[worker_pb2.Step | None] = asyncio.Queue()
        self._steps.append(steps)
        reader = asyncio.create_task(self._read(messages, steps))
        try:
            if self.frozen:
                await asyncio.Event().wait()
            yield worker_pb2.WorkerMessage(hello=self._description())
            while step := await steps.get():
                yield worker_pb2.WorkerMessage(step=step)
        finally:
            reader.cancel()
            self._steps.remove(steps)
            for wire_id in list(self.held):
                self._drop(wire_id)

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Any) -> worker_pb2.WorkerDescription:
        if self.frozen:
            await asyncio.Event().wait()
        return self._description()

    async def _read(
        self, messages: AsyncIterator[worker_pb2.RouterMessage], steps: asyncio.Queue[worker_pb2.Step | None]
    ) -> None:
        async for message in messages:
            self.messages.append(message)
            kind = message.WhichOneof("kind")
            body = getattr(message, kind)
            if kind in ("prefill", "decode"):
                self.held[body.request_id] = body
            if kind == "prefill":
                self._queued[body.request_id] = len(body.token_ids) // TOKEN_BYTES
            if kind in ("cancel", "release"):
                self._drop(body.request_id)
            if kind in ("prefill", "start"):
                self._tasks[body.request_id] = asyncio.create_task(self.script(self, body))
        steps.put_nowait(None)  # the router hung up

    def _drop(self, wire_id: str) -> None:
        self.held.pop(wire_id, None)
        self._queued.pop(wire_id, None)
        if task := self._tasks.pop(wire_id, None):
            task.cancel()

    def _present_load(self) -> worker_pb2.WorkerLoad:
        """`load`, with what is running here now."""
        present = worker_pb2.WorkerLoad()
        present.CopyFrom(self.load)
        if self.record.pool != "prefill":
            present.running += len(self.held)
        present.queued_tokens += sum(self._queued.values())
        return present

    def _description(self) -> worker_pb2.WorkerDescription:
        record = self.record
        return worker_pb2.WorkerDescription(
            worker_id=record.worker_id,
            incarnation=record.incarnation,
            pool=record.pool,
            source=worker_pb2.PageSource(
                worker_id=record.worker_id,
                incarnation=record.incarnation,
                format=record.format.to_proto(),
                endpoints=[worker_pb2.Endpoint(transport=t, address=a) for t, a in record.endpoints],
            ),
            max_tokens=record.max_tokens,
            load=self._present_load(),
            draining=record.draining,
        )


def page_refs(message: worker_pb2.Prefill) -> list[worker_pb2.PageRef]:
    """Every page of the prompt, the part-filled last one too."""
    count = -(-len(unpack_tokens(message.token_ids)) // PAGE_SIZE)
    return [worker_pb2.PageRef(index=index, page=index + 5, generation=9) for index in range(count)]


async def serve_prefill(worker: FakeWorker, message: worker_pb2.Prefill) -> None:
    """All pages but the last, then the last one with the first token; the pages stay held."""
    *pages, tail = page_refs(message)
    if pages:
        await worker.say(message.request_id, sealed=pages)
    first = worker.answer(unpack_tokens(message.token_ids))[0]
    report = worker_pb2.PrefillReport(queue_ms=1.5, compute_ms=20.0, prefix_pages=1)
    await asyncio.sleep(worker.pause_s)
    await worker.say(message.request_id, sealed=[tail], token_ids=[first], prefill=report)


async def serve_decode(worker: FakeWorker, message: worker_pb2.Start) -> None:
    """Join, then one token a message, as long as the request says."""
    report = worker_pb2.HandOverReport(pages=2, bytes=4096, pull_ms=3.0, prefix_pages=1, transport="shm")
    await worker.say(message.request_id, hand_over=report)
    await go_on(worker, worker.held[message.request_id])


async def serve_colocated(worker: FakeWorker, message: worker_pb2.Prefill) -> None:
    """The first token with what prefill tells, then as decode does; no page is named."""
    first = worker.answer(unpack_tokens(message.token_ids))[0]
    report = worker_pb2.PrefillReport(queue_ms=1.5, compute_ms=20.0, prefix_pages=1)
    await asyncio.sleep(worker.pause_s)
    await worker.say(message.request_id, token_ids=[first], prefill=report)
    await go_on(worker, message)


async def go_on(worker: FakeWorker, request: worker_pb2.Prefill | worker_pb2.Decode) -> None:
    """All tokens of the answer behind the first, one a message."""
    answer = worker.answer(unpack_tokens(request.token_ids))
    for index in range(1, request.sampling.max_tokens):
        await asyncio.sleep(worker.pause_s)
        token = answer[index]
        finish = STOP if token in request.end_token_ids else LENGTH if index + 1 == request.sampling.max_tokens else 0
        if finish:
            worker.held.pop(request.request_id)
        await worker.say(request.request_id, token_ids=[token], finish_reason=finish)
        if finish:
            return


async def never(worker: FakeWorker, message: Any) -> None:
    """Take the message and say nothing."""

"""A router with fake workers, in this process."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc.aio
import pytest

from engine.tokenizer import Tokenizer
from fake_worker import FakeWorker
from kvstore.memory_directory import MemoryDirectory
from protos import errors
from protos.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from router.config import RouterConfig
from router.service import Router
from rpc import status

GREEDY = {"max_tokens": 8, "ignore_eos": True}


@dataclass
class Whole:
    """One answer, put together."""

    token_ids: list[int]
    text: str
    last: inference_pb2.GenerateResponse
    messages: int


@dataclass
class Rig:
    """`async with Rig(model) as rig`: 1 prefill and 1 decode worker unless told otherwise.

    At its end nothing may be held, and no task may be left.
    """

    model: Path
    prefill_count: int = 1
    decode_count: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    directory: MemoryDirectory = field(default_factory=MemoryDirectory)
    colocated_count: int = 0

    async def __aenter__(self) -> Self:
        self._tasks_before = asyncio.all_tasks()
        self.tokenizer = Tokenizer.from_dir(self.model)
        self.prefills = [await self.worker("prefill", index) for index in range(self.prefill_count)]
        self.decodes = [await self.worker("decode", index) for index in range(self.decode_count)]
        self.colocated = [await self.worker("colocated", index) for index in range(self.colocated_count)]
        config = {"router_id": "r0", "model": str(self.model), "model_id": "tiny", "redis_url": "", "port": 0}
        self.router = await Router.start(RouterConfig(**(config | self.settings)), self.directory)
        self.channel = grpc.aio.insecure_channel(self.router.address)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if error is None:
                await self.assert_nothing_held()
        finally:
            await self.channel.close()
            await self.router.stop()
            await asyncio.gather(*(worker.die() for worker in self.workers))
        if error is None:
            await self._assert_no_task_left()

    @property
    def workers(self) -> list[FakeWorker]:
        return [*self.prefills, *self.decodes, *self.colocated]

    @property
    def prefill(self) -> FakeWorker:
        return self.prefills[0]

    @property
    def decode(self) -> FakeWorker:
        return self.decodes[0]

    async def worker(self, pool: str, index: int = 0, **record: Any) -> FakeWorker:
        """A started worker; the caller keeps it in `prefills`, `decodes` or `colocated`."""
        return await FakeWorker(pool, self.directory, worker_id=f"{pool}-{index}", **record).start()

    def generate(
        self, prompt: Any = None, *, deadline_s: float | None = 20.0, request_id: str = "", **sampling: Any
    ) -> Any:
        """The call, not yet read. The prompt is a text, ids or (role, content) pairs."""
        request = inference_pb2.GenerateRequest(
            model="tiny", request_id=request_id, sampling=common_pb2.SamplingParams(**(GREEDY | sampling))
        )
        return self.stub.Generate(with_prompt(request, prompt or list(range(3, 43))), timeout=deadline_s)

    async def complete(self, prompt: Any = None, **options: Any) -> Whole:
        """The whole answer. Raises the typed error."""
        return await read(self.generate(prompt, **options))

    async def assert_nothing_held(self, within_s: float = 5.0) -> None:
        """No worker holds anything, and the router knows of no request."""
        await until(lambda: not self.leftovers(), within_s, self.leftovers)

    def leftovers(self) -> list[str]:
        found = [wire for worker in self.workers for wire in worker.held]
        found += [wire for link in self.router.fleet.links.values() for wire in link.claims]
        found += [str(life) for life in self.router.inference.lives]
        return found + list(self.router.inference.admission.inflight)

    async def _assert_no_task_left(self) -> None:
        def left() -> set[asyncio.Task[Any]]:
            return {t for t in asyncio.all_tasks() - self._tasks_before if t is not asyncio.current_task()}

        await until(lambda: not left(), 2.0, left)


async def until(condition: Callable[[], Any], within_s: float = 5.0, instead: Callable[[], Any] = str) -> None:
    """Wait until the condition holds. `instead` says what is the case, should it not come to hold."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"it did not come to hold: {instead()}"
        await asyncio.sleep(0.005)


def with_prompt(request: Any, prompt: Any) -> Any:
    """Put a prompt into a GenerateRequest or a TokenizeRequest."""
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], tuple):
        for role, content in prompt:
            request.chat.messages.add(role=role, content=content)
    else:
        request.tokens.ids.extend(prompt)
    return request


async def read(call: Any) -> Whole:
    """Read a call to its end. Raises the typed error."""
    ids, text, count, last = [], "", 0, None
    try:
        async for message in call:
            ids += message.token_ids
            text += message.text
            count += 1
            last = message
    except grpc.aio.AioRpcError as error:
        raise status.from_rpc_error(error) from error
    assert last is not None
    return Whole(ids, text, last, count)


async def fails(call: Any, kind: type[errors.DiptychError]) -> Any:
    """The error of a call that must fail; it must have come from the router, not from the client's own gRPC."""
    with pytest.raises(kind) as caught:
        await read(call)
    assert type(caught.value) is kind
    cause = caught.value.__cause__
    assert isinstance(cause, grpc.aio.AioRpcError)
    assert status.DETAIL_KEY in dict(cause.trailing_metadata())
    return caught.value


async def messages(call: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """A call's messages, with typed errors."""
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as error:
        raise status.from_rpc_error(error) from error

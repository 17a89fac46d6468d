"""What the router's CPU has to do for a token: python -m benchmarks.router

The router runs in this process, between a worker that says by script what a step of many sequences would say, and
clients that read their streams; each has a process of its own. CPU time is this process's, with gRPC's threads, from
where every stream has its first token. With more tokens than the router can take, the worker joins steps into one
message, as it always does.
"""

import argparse
import asyncio
import multiprocessing
import multiprocessing.synchronize
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.record import ROOT, write_result
from engine.byte_tokenizer import VOCAB, write_byte_tokenizer
from kvstore.directory import WorkerRecord
from kvstore.memory_directory import MemoryDirectory
from kvstore.page_format import PageFormat
from protos.v1 import common_pb2, inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from router.config import RouterConfig
from router.service import Router
from rpc.server import start_server
from worker.outbox import Outbox

FORMAT = PageFormat(layers=2, kv_heads=2, page_size=16, head_dim=16, dtype="float32")
LENGTH = common_pb2.FINISH_REASON_LENGTH
Event = multiprocessing.synchronize.Event


class ScriptedWorker(worker_pb2_grpc.WorkerServicer):
    """Waits for all requests, says their first tokens, and then a token of each in every step."""

    def __init__(self, streams: int, tokens: int, step_s: float, steady: Event) -> None:
        self._streams = streams
        self._tokens = tokens
        self._step_s = step_s
        self._steady = steady

    async def Connect(
        self, messages: AsyncIterator[worker_pb2.RouterMessage], context: Any
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        yield worker_pb2.WorkerMessage(hello=worker_pb2.WorkerDescription(incarnation=1, pool="colocated"))
        wire_ids: list[str] = []
        async for message in messages:
            if message.WhichOneof("kind") == "prefill":
                wire_ids.append(message.prefill.request_id)
            if len(wire_ids) == self._streams:
                break
        outbox = Outbox(asyncio.get_running_loop())
        computing = asyncio.create_task(self._compute(wire_ids, outbox))
        try:
            while step := await outbox.take():
                yield worker_pb2.WorkerMessage(step=step)
        finally:
            computing.cancel()
            await asyncio.wait({computing})

    async def _compute(self, wire_ids: list[str], outbox: Outbox) -> None:
        self._step(wire_ids, 1, outbox)
        await asyncio.sleep(1.0)
        self._steady.set()
        due = time.monotonic()
        for token in range(2, self._tokens + 1):
            due += self._step_s
            await asyncio.sleep(due - time.monotonic())
            self._step(wire_ids, token, outbox)

    def _step(self, wire_ids: list[str], token: int, outbox: Outbox) -> None:
        finish = LENGTH if token == self._tokens else None
        updates = [
            worker_pb2.SequenceUpdate(request_id=w, token_ids=[(token + n) % VOCAB], finish_reason=finish)
            for n, w in enumerate(wire_ids)
        ]
        load = worker_pb2.WorkerLoad(running=len(wire_ids), total_pages=10_000, available_pages=5_000)
        outbox.post(updates, load)


def serve_worker(streams: int, tokens: int, step_s: float, steady: Event, address: Any) -> None:
    """A process of its own: the worker, until it is ended."""

    async def serve() -> None:
        worker = ScriptedWorker(streams, tokens, step_s, steady)
        server = await start_server(
            lambda s: worker_pb2_grpc.add_WorkerServicer_to_server(worker, s), [], "127.0.0.1", 0
        )
        address.send(server.address)
        await asyncio.sleep(3600)

    asyncio.run(serve())


def read_streams(router: str, streams: int, tokens: int) -> list[float]:
    """A process of its own: the clients. Milliseconds between messages, from the second on."""

    async def read(stub: inference_pb2_grpc.InferenceStub) -> list[float]:
        request = inference_pb2.GenerateRequest(
            tokens=inference_pb2.TokenIds(ids=range(3, 43)),
            sampling=common_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True, stop=["never said"]),
        )
        times, got = [], 0
        async for message in stub.Generate(request, timeout=300):
            times.append(1e3 * time.monotonic())
            got += len(message.token_ids)
        assert got == tokens
        return [later - earlier for earlier, later in pairwise(times[1:])]

    async def all_of_them() -> list[float]:
        async with grpc.aio.insecure_channel(router) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            return list(chain.from_iterable(await asyncio.gather(*(read(stub) for _ in range(streams)))))

    return asyncio.run(all_of_them())


async def measure(model: Path, streams: int, tokens: int, step_ms: float, clients: int) -> dict[str, Any]:
    """One run."""
    context = multiprocessing.get_context("spawn")
    steady, (ours, theirs) = context.Event(), context.Pipe()
    arguments = (streams, tokens, step_ms / 1e3, steady, theirs)
    worker = context.Process(target=serve_worker, args=arguments, daemon=True)
    worker.start()
    directory = MemoryDirectory()
    record = WorkerRecord(
        worker_id="w", incarnation=1, pool="colocated", address=await asyncio.to_thread(ours.recv), model="model",
        fingerprint="weights", format=FORMAT, max_tokens=100_000, endpoints=(),
    )  # fmt: skip
    directory.renew(record, 3600.0)
    config = RouterConfig("r", str(model), "model", "", port=0, max_inflight=2 * streams)
    router = await Router.start(config, directory)
    loop = asyncio.get_running_loop()
    try:
        with ProcessPoolExecutor(clients, mp_context=context) as pool:
            shares = [streams // clients + (n < streams % clients) for n in range(clients)]
            reading = [loop.run_in_executor(pool, read_streams, router.address, n, tokens) for n in shares]
            await asyncio.to_thread(steady.wait, 60)
            began, cpu = time.monotonic(), time.process_time()
            gaps = sorted(chain.from_iterable(await asyncio.gather(*reading)))
            took, cpu = time.monotonic() - began, time.process_time() - cpu
    finally:
        await router.stop()
        worker.terminate()
        worker.join(10)
    said = streams * (tokens - 1)
    return {
        "streams": streams,
        "step_ms": step_ms,
        "us_a_token": round(1e6 * cpu / said, 2),
        "tokens_per_s": round(said / took),
        "tokens_a_message": round(said / (len(gaps) + streams), 2),
        "gap_ms_median": round(gaps[len(gaps) // 2], 2),
        "gap_ms_99th": round(gaps[len(gaps) * 99 // 100], 2),
    }


def make_model(path: Path) -> Path:
    """A model's directory as far as a router reads it."""
    shutil.copy(ROOT / "benchmarks" / "configs" / "smollm2-135m.json", path / "config.json")
    write_byte_tokenizer(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=400, help="of each answer")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[20.0, 2.0], help="between tokens")
    parser.add_argument("--clients", type=int, default=2, help="processes")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        for step_ms in arguments.step_ms:
            runs = [
                asyncio.run(measure(model, arguments.streams, arguments.tokens, step_ms, arguments.clients))
                for _ in range(arguments.repeats)
            ]
            rows.append({name: statistics.median(run[name] for run in runs) for name in runs[0]})
            print(rows[-1], flush=True)
    print(write_result("router", {"tokens": arguments.tokens, "repeats": arguments.repeats, "rows": rows}))


if __name__ == "__main__":
    main()

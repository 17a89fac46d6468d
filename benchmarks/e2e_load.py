"""Requests as clients see them: one after the other, and many at once from several processes."""

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio
import numpy as np
import psutil

from diptych.client import Client
from protos.v1 import worker_pb2, worker_pb2_grpc
from protos.v1.inference_pb2 import RequestStats

_SAMPLE_S = 0.02


@dataclass(frozen=True)
class Streamed:
    """One answer: when each token came (time.monotonic, the same clock in every process), and the router's stats."""

    began: float
    times: list[float]
    stats: bytes  # RequestStats: travels between processes


async def stream(client: Client, prompt: Sequence[int], tokens: int) -> Streamed:
    began, times, stats = time.monotonic(), [], None
    async for chunk in client.generate(token_ids=prompt, max_tokens=tokens, ignore_eos=True, deadline_s=300):
        times += [time.monotonic()] * len(chunk.token_ids)
        stats = chunk.stats or stats
    assert stats is not None
    assert len(times) == tokens
    return Streamed(began, times, stats.SerializeToString())


def one_request(streamed: Streamed, prompt_tokens: int) -> dict[str, Any]:
    """What one request cost. `exposed_ms` is how much longer the second token took than those after it."""
    stats = RequestStats.FromString(streamed.stats)
    gaps = np.diff(streamed.times) * 1e3
    tpot = float(np.median(gaps[1:]))
    return {
        "prompt_tokens": prompt_tokens,
        "ttft_ms": (streamed.times[0] - streamed.began) * 1e3,
        "tpot_ms": tpot,
        "exposed_ms": float(gaps[0]) - tpot,
        "router_ttft_ms": stats.first_token_ms,
        "queue_ms": stats.queue_ms,
        "prefill_ms": stats.prefill_ms,
        "decode_joined_ms": stats.decode_joined_ms,
        "pages": stats.pages_handed_over,
        "bytes": stats.bytes_handed_over,
        "pull_ms": stats.hand_over_ms,
        "transport": stats.transport,
        "prefix_pages": max(stats.prefill_prefix_pages, stats.decode_prefix_pages),
    }


def medians(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each number over requests of one kind."""
    numbers = [name for name, value in requests[0].items() if not isinstance(value, str)]
    return {name: statistics.median(request[name] for request in requests) for name in numbers}


async def many_streams(
    router: str, process: psutil.Process, decode: str, prompts: list[list[int]], tokens: int, clients: int
) -> dict[str, Any]:
    """All prompts at once. CPU and latency are taken while every stream is past its first token and none has ended.

    `process` is the router's, `decode` the address of the only decode worker. `clients` is a number of processes: one
    alone would be slower than the router that it measures.
    """
    probe = Probe(router, process, decode)
    idle = [await probe.call_ms() for _ in range(50)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(clients, context.Barrier(clients).wait) as pool:  # nobody begins before all have started
        parts = [(router, prompts[i::clients], tokens) for i in range(clients)]
        running = asyncio.create_task(asyncio.to_thread(pool.starmap, _client, parts))
        samples = []
        while not running.done():
            samples.append(await probe.sample())
            await asyncio.sleep(_SAMPLE_S)
        streams = [streamed for part in running.result() for streamed in part]
    await probe.close()
    return {"streams": len(prompts), "tokens": tokens, "call_idle_ms": statistics.median(idle)} | _steady(
        streams, samples
    )


class Probe:
    """Looks at router and decode worker from outside."""

    def __init__(self, router: str, process: psutil.Process, decode: str) -> None:
        self._client = Client(router)
        self._process = process
        self._channel = grpc.aio.insecure_channel(decode)
        self._decode = worker_pb2_grpc.WorkerStub(self._channel)

    async def call_ms(self) -> float:
        """A call that does next to nothing: it waits in the router's loop as long as tokens do."""
        began = time.monotonic()
        await self._client.list_models()
        return (time.monotonic() - began) * 1e3

    async def sample(self) -> tuple[float, float, float, float]:
        """Now, the router's CPU seconds so far, a call's milliseconds, the decode worker's milliseconds a step."""
        call = await self.call_ms()
        description = await self._decode.Describe(worker_pb2.DescribeRequest())
        times = self._process.cpu_times()
        return time.monotonic(), times.user + times.system, call, description.load.step_ms

    async def close(self) -> None:
        await self._client.close()
        await self._channel.close()


def _client(router: str, prompts: list[list[int]], tokens: int) -> list[Streamed]:
    async def run() -> list[Streamed]:
        async with Client(router) as client:
            return list(await asyncio.gather(*(stream(client, prompt, tokens) for prompt in prompts)))

    return asyncio.run(run())


def _steady(streams: list[Streamed], samples: list[tuple[float, float, float, float]]) -> dict[str, Any]:
    """Between the last stream's first token and the first stream's last one."""
    begin, end = max(s.times[0] for s in streams), min(s.times[-1] for s in streams)
    at, cpu, call, step = (np.array(column) for column in zip(*samples, strict=True))
    inside = (at >= begin) & (at <= end)
    if inside.sum() < 3:
        raise RuntimeError(f"the streams were together for {end - begin:.3f} s only: ask for longer answers")
    first, last = at[inside][0], at[inside][-1]
    arrived = np.array([t for s in streams for t in s.times])
    tokens = int(((arrived > first) & (arrived <= last)).sum())
    cpu_s = float(cpu[inside][-1] - cpu[inside][0])
    tpot = statistics.median((s.times[-1] - s.times[0]) / (len(s.times) - 1) for s in streams)
    return {
        "seconds": float(last - first),
        "tokens_per_s": tokens / float(last - first),
        "ttft_ms": statistics.median((s.times[0] - s.began) * 1e3 for s in streams),
        "tpot_ms": tpot * 1e3,
        "decode_step_ms": float(np.median(step[inside])),
        "router_cpu_us_per_token": cpu_s / tokens * 1e6,
        "router_cores": cpu_s / float(last - first),
        "call_ms": float(np.median(call[inside])),
        "call_p90_ms": float(np.quantile(call[inside], 0.9)),
    }

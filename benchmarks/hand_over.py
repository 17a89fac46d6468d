"""What a hand-over costs: the wait for a long prompt's second token, and what the running batch loses meanwhile.

    PYTHONPATH=.:tests python -m benchmarks.hand_over

A router, a prefill and a decode worker, each a process of its own; the workers have a GPU each where there are two,
else they share one. The model has an 8B model's shape and random weights: 8,192 tokens of prompt are 1 GiB of pages.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.e2e_load import medians, one_request, stream
from benchmarks.record import write_result
from engine import hub
from engine.config import EngineConfig
from protos.v1 import worker_pb2, worker_pb2_grpc
from protos.v1.inference_pb2 import RequestStats
from stack import Service, Stack

CONFIG = Path(__file__).parent / "configs" / "llama-3-8b.json"
PROMPT, ANSWER = 8192, 48
PAGES = 128  # of one pull: 1 GiB
STREAMS, STREAM_PROMPT = 16, 256
PHASE_S = 1.0
Json = dict[str, Any]


class PairStack(Stack):
    """The n-th pool's workers are on the n-th GPU."""

    async def add(self, pool: str) -> Service:
        gpus = gpu_count()
        if gpus > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(["prefill", "decode"].index(pool) % gpus)
        return await super().add(pool)  # the process is started before anything is waited for


@dataclass
class Arrivals:
    """When tokens of the running batch came."""

    times: list[float]

    def step_ms(self, begin: float, end: float) -> float:
        """Mean time between two tokens of one stream."""
        return (end - begin) * 1e3 * STREAMS / sum(begin <= at < end for at in self.times)


def gpu_count() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return 0
    return len(listed.stdout.splitlines())


def prompt(rng: random.Random, vocab: int, length: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(length)]


async def run_streams(stack: Stack, prompts: list[list[int]], tokens: int, arrivals: Arrivals) -> None:
    async def one(ids: list[int]) -> None:
        async for chunk in stack.client.generate(token_ids=ids, max_tokens=tokens, ignore_eos=True, deadline_s=300):
            arrivals.times += [time.monotonic()] * len(chunk.token_ids)

    await asyncio.gather(*(one(ids) for ids in prompts))


async def pull_over_and_over(stack: Stack, until: float) -> Json:
    """1 GiB after the other from prefill's pool into decode's, by the decode worker's own puller."""
    moved, began = 0, time.monotonic()
    async with (
        grpc.aio.insecure_channel(stack.prefill[0].address) as there,
        grpc.aio.insecure_channel(stack.decode[0].address) as here,
    ):
        lending = worker_pb2_grpc.WorkerStub(there).Lend(worker_pb2.LendRequest(pages=PAGES))
        loan = await anext(aiter(lending))
        while time.monotonic() < until:
            request = worker_pb2.MeasureRequest(source=loan.source, pages=loan.pages)
            found = await worker_pb2_grpc.WorkerStub(here).Measure(request)
            moved += 5 * found.bytes
        lending.cancel()
    return {
        "transport": found.transport,
        "pull_gb_per_s": found.bytes / found.pull_ms / 1e6,
        "mean_gb_per_s": moved / (time.monotonic() - began) / 1e9,
    }


async def prompts_over_and_over(stack: Stack, rng: random.Random, vocab: int, until: float) -> Json:
    """Prompts of 1 GiB one after the other, each with two tokens of answer."""
    requests = []
    while time.monotonic() < until:
        streamed = await stream(stack.client, prompt(rng, vocab, PROMPT), 2)
        requests.append(RequestStats.FromString(streamed.stats).hand_over_ms)
    return {"prompts": len(requests), "pull_ms": statistics.median(requests)}


async def beside(arrivals: Arrivals, work: Callable[[float], Awaitable[Json]]) -> Json:
    """The running batch's pace while `work` goes on, and before and after it."""
    marks = [time.monotonic()]
    await asyncio.sleep(PHASE_S)
    marks.append(time.monotonic())
    result = await work(marks[-1] + PHASE_S)
    marks.append(time.monotonic())
    await asyncio.sleep(PHASE_S)
    marks.append(time.monotonic())
    before, during, after = (arrivals.step_ms(begin, end) for begin, end in pairwise(marks))
    quiet = (before + after) / 2
    return result | {"quiet_ms": quiet, "during_ms": during, "slowdown": during / quiet}


async def measure(model: str, budget: int, device: str, repeats: int, small: bool) -> Json:
    vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    rng = random.Random(0)
    engine = EngineConfig(
        page_size=64,
        token_budget=budget,
        max_sequences=64,
        device=device,
        dtype="bfloat16",
        load="random",
        gpu_memory=0.45,
        num_pages=600 if small else 0,
    )
    began = time.monotonic()
    async with PairStack(Path(model), engine=engine, transports=("cuda_ipc", "shm", "tcp")) as stack:
        result: Json = {"token_budget": budget, "up_s": time.monotonic() - began}
        alone = []
        for turn in range(-2, repeats):  # the first ones compile, connect and map
            streamed = await stream(stack.client, prompt(rng, vocab, PROMPT), ANSWER)
            if turn >= 0:
                alone.append(one_request(streamed, PROMPT))
        result["alone"] = medians(alone) | {"transport": alone[0]["transport"]}
        result["exposed_ms"] = sorted(request["exposed_ms"] for request in alone)
        show(result)
        arrivals = Arrivals([])
        prompts = [prompt(rng, vocab, STREAM_PROMPT) for _ in range(STREAMS)]
        running = asyncio.create_task(run_streams(stack, prompts, 900 if small else 4000, arrivals))
        await asyncio.sleep(PHASE_S)
        result["while_pages_arrive"] = await beside(arrivals, lambda until: pull_over_and_over(stack, until))
        show(result["while_pages_arrive"])
        result["while_prompts_arrive"] = await beside(
            arrivals, lambda until: prompts_over_and_over(stack, rng, vocab, until)
        )
        show(result["while_prompts_arrive"])
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await stack.assert_nothing_held()
    return result


def show(result: Json) -> None:
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 8192], help="prompt tokens of one step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", default="hand_over", help="of the result's file")
    parser.add_argument("--cpu", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads(CONFIG.read_text()) | {"max_position_embeddings": 2 * PROMPT}
        if args.cpu:
            sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
            config |= sizes | {"intermediate_size": 64, "head_dim": 32, "vocab_size": 1000}
        path = Path(folder) / "llama-3-8b.json"
        path.write_text(json.dumps(config))
        model = hub.resolve(str(path), print, "random").path
        runs = []
        for budget in args.budgets:
            runs.append(asyncio.run(measure(str(model), budget, "cpu" if args.cpu else "cuda", args.repeats, args.cpu)))
            result = {"gpus": gpu_count(), "prompt_tokens": PROMPT, "streams": STREAMS, "runs": runs}
            print(write_result(args.name, result))


if __name__ == "__main__":
    main()

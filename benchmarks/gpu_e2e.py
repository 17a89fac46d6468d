"""The whole path on one machine: a real cluster, its answers checked, its times taken.

    python -m benchmarks.gpu_e2e

For each model: one colocated worker answers a set of prompts. Then the cluster is scaled to a prefill and a decode
worker, which share the GPU or have one each where there are two. They must give the same greedy answers; and then
they are timed.
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.e2e_answers import Answer, ask, compare, distance
from benchmarks.e2e_cluster import Cluster
from benchmarks.e2e_load import many_streams, medians, one_request, stream
from benchmarks.record import ROOT, write_result
from diptych.client import Client
from engine import hub
from protos.errors import DiptychError

CONFIGS = Path(__file__).parent / "configs"
# Nats. Activations in bfloat16 are rounded to 8 bits some 200 times on their way through 32 layers: 2 to 3% of the
# logits' spread, which is about 1, four times as much at the worst of some thousand places, and logits of 4 to 8 are
# themselves rounded to 1/32. The control shows what a wrong page does.
BOUNDS = {"bfloat16": 0.25, "float32": 1e-3}
LENGTHS = (1, 63, 64, 65, 130, 511, 512, 700, 1025, 2000)  # of the prompts that are compared: on page edges, and off
Json = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    answer: int = 32  # tokens of each compared answer
    timed: tuple[int, ...] = (512, 2048, 6144)  # prompt tokens of requests that are timed alone
    repeats: int = 5
    answer_timed: int = 48
    streams: int = 128
    answer_streams: int = 768
    prompt_streams: int = 256
    clients: int = 4  # processes


class Prompts:
    """Token ids at random: no two prompts share a page."""

    def __init__(self, vocab: int, seed: int = 0) -> None:
        self._random, self._vocab = random.Random(seed), vocab

    def take(self, length: int) -> list[int]:
        return [self._random.randrange(self._vocab) for _ in range(length)]


def compared_prompts(prompts: Prompts, lengths: tuple[int, ...], page: int) -> dict[str, list[int]]:
    """Prompts of every length, and two that go on from another's pages."""
    found = {f"{length} tokens": prompts.take(length) for length in lengths}
    longest = found[f"{max(lengths)} tokens"]
    shared = longest[: len(longest) // 2 // page * page]
    found |= {f"prefix {i}": shared + prompts.take(page + i) for i in range(2)}
    return found


async def ask_all(client: Client, prompts: dict[str, list[int]], tokens: int) -> dict[str, Answer]:
    """One after the other: no batch differs between split and colocated workers."""
    return {name: await ask(client, prompt, tokens) for name, prompt in prompts.items()}


async def wrong_page(client: Client, prompts: Prompts, length: int, page: int) -> float:
    """Nats by which the next token's log-probabilities differ where one page in the middle is another: the control."""
    right = prompts.take(length)
    middle = length // 2 // page * page
    wrong = right[:middle] + prompts.take(page) + right[middle + page :]
    one, other = await ask(client, right, 1), await ask(client, wrong, 1)
    return distance(one.logprobs[0], other.logprobs[0])


async def time_requests(client: Client, prompts: Prompts, sizes: Sizes) -> list[Json]:
    """Requests alone, none of which finds a page that is there already."""
    requests = []
    for length in sizes.timed:
        await stream(client, prompts.take(length), 4)  # kernels of this length are compiled, or loaded
        for _ in range(sizes.repeats):
            streamed = await stream(client, prompts.take(length), sizes.answer_timed)
            requests.append(one_request(streamed, length))
    return requests


class Run:
    """One model through a cluster."""

    def __init__(self, name: str, settings: Json, sizes: Sizes, lengths: tuple[int, ...], vocab: int) -> None:
        self.name, self._settings, self._sizes, self._lengths = name, settings, sizes, lengths
        self._prompts = Prompts(vocab)
        self._page = settings["engine"]["page_size"]
        model = settings["model"].removeprefix(f"{ROOT}/")
        self.result: Json = {"model": model, "engine": settings["engine"], "gpus": gpus("name")}
        self._began = time.monotonic()

    def note(self, key: str, value: Any) -> None:
        """Part of the result, shown at once: a run that is cut short has said what it knew."""
        self.result[key] = value
        print(f"{time.monotonic() - self._began:6.1f} s {self.name} {key}: {value}", flush=True)

    def __call__(self) -> None:
        prompts = compared_prompts(self._prompts, self._lengths, self._page)
        with Cluster(self._settings | {"mode": "colocated"}) as cluster:
            self.note("up_s", cluster.up_s)
            self._note_workers("colocated_workers", cluster)
            colocated = asyncio.run(self._answers(cluster, prompts))
            cluster.wait_empty()
            self.note("scale_to_split_s", cluster.scale(colocated=0, prefill=1, decode=1))
            self._note_workers("split_workers", cluster)
            split = asyncio.run(self._answers(cluster, prompts))
            bound = BOUNDS[self._settings["engine"]["dtype"]]
            self.note("split_and_colocated", compare(split, colocated, bound))
            asyncio.run(self._measure(cluster))
            cluster.wait_empty()
            self.note("gpu_memory_used", gpus("memory.used"))
        self.note("pools_after", "nothing held, no process left")

    def _note_workers(self, key: str, cluster: Cluster) -> None:
        workers = cluster.workers()
        self.note(key, [{"id": w.worker_id, "device": w.device, "pages": w.load.total_pages} for w in workers])

    async def _answers(self, cluster: Cluster, prompts: dict[str, list[int]]) -> dict[str, Answer]:
        async with Client(cluster.router) as client:
            return await ask_all(client, prompts, self._sizes.answer)

    async def _measure(self, cluster: Cluster) -> None:
        async with Client(cluster.router) as client:
            length = sorted(self._lengths)[len(self._lengths) // 2]
            self.note("control_wrong_page", await wrong_page(client, self._prompts, length, self._page))
            requests = await time_requests(client, self._prompts, self._sizes)
        self.note("requests", requests)
        lengths = self._sizes.timed
        self.note("medians", [medians([r for r in requests if r["prompt_tokens"] == n]) for n in lengths])
        await self._load(cluster)

    async def _load(self, cluster: Cluster) -> None:
        sizes = self._sizes
        [decode] = [w.address for w in cluster.workers() if w.worker_id.startswith("decode")]
        batch = [self._prompts.take(sizes.prompt_streams) for _ in range(sizes.streams)]
        process = cluster.router_process()
        found = await many_streams(cluster.router, process, decode, batch, sizes.answer_streams, sizes.clients)
        self.note("many", found)


def gpus(what: str) -> list[str]:
    """A property of each GPU, as nvidia-smi calls it; none where there is no GPU."""
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []


def failures(result: Json) -> list[str]:
    """What of a model's result must not be."""
    found, control = result["split_and_colocated"], result["control_wrong_page"]
    failed = []
    if not found["within_bound"]:
        failed.append(f"split and colocated are {found['largest_logprob_difference']} nats apart")
    if control <= found["bound"]:
        failed.append(f"a wrong page makes {control} nats only: the comparison would not see it")
    return failed


def small_model() -> tuple[str, str]:
    """The demo model where it can be had, else random weights of its shape: model and how it is loaded."""
    os.environ |= {"PIP_RETRIES": "0", "PIP_TIMEOUT": "5"}  # a machine without a network should not wait for one
    try:
        hub.resolve(hub.DEMO_MODEL, print)
    except DiptychError as error:
        print(f"no demo model here, random weights of its shape instead: {error.message.splitlines()[0][:120]}")
        return str(CONFIGS / "smollm2-135m.json"), "random"
    return hub.DEMO_MODEL, "auto"


def settings(model: str, load: str, device: str, **engine: Any) -> Json:
    """Of the cluster, as `diptych up --config` takes them."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    return {
        "name": "gpu-e2e",
        "model": model,
        "port": 0,
        "operator_port": 0,
        "gpu_share": min(1.0, max(1, len(gpus("name"))) / 2),  # the first worker leaves room for a second one
        "engine": {"page_size": 64, "device": device, "dtype": dtype, "load": load} | engine,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="small,8b", help="small, 8b or both, with a comma")
    parser.add_argument("--name", default="gpu_e2e", help="of the result")
    args = parser.parse_args()
    result: Json = {}
    for name in args.models.split(","):
        model, load = small_model() if name == "small" else (str(CONFIGS / "llama-3-8b.json"), "random")
        vocab = 49152 if name == "small" else 128256
        run = Run(name, settings(model, load, "cuda"), Sizes(), LENGTHS, vocab)
        result[name] = run.result
        try:
            run()
        finally:  # a run that is cut short keeps what it found
            print(write_result(args.name, result))
    failed = [f"{name}: {what}" for name in result for what in failures(result[name])]
    sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()

"""Diptych on one machine without a GPU against transformers on the same model, both sides in one run.

    python -m benchmarks.laptop --dtype float32

Each round measures both sides one after the other, so that a shared machine's drift meets both; medians are over
rounds.
One torch thread in every process. Ours is the whole path (client, router, workers, Valkey, Ray), with a prefill and a
decode worker (`diptych`) and with one colocated worker (`colocated`), a cluster each; transformers runs in this
process.
`engine alone` is our engine in this process, without a cluster: what the whole path adds to it is overhead.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch
from transformers import AutoModelForCausalLM

from benchmarks.record import write_result
from diptych.client import Client
from engine import hub
from engine.config import EngineConfig
from engine.engine import Engine
from engine.fingerprint import weight_files
from engine.loader import load_model
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.tokenizer import Tokenizer
from kvstore.keys import PageKey, page_keys
from kvstore.pool import PagePool
from protos.v1.inference_pb2 import RequestStats

PAGE_SIZE = 64
PROMPT = 512  # tokens, for TTFT
SHORT = 64  # tokens of each concurrent request's prompt
STREAMS = (8, 32)


class Prompts:
    """Prompts that share no prefix, so that no cache helps either side."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        text = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
        self._ids = tokenizer.encode(text)[:PROMPT]
        self._next = 1000

    def take(self, length: int) -> list[int]:
        self._next += 1
        return [self._next, *self._ids[: length - 1]]


class Transformers:
    """The peer: `generate`, greedy, no early end."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds for a static batch of prompts of one length."""
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        assert out.shape[1] == ids.shape[1] + tokens
        return time.perf_counter() - started


class EngineAlone:
    """Our engine without workers, router or network."""

    def __init__(self, path: Path, dtype: str) -> None:
        loaded = load_model(path, dtype, "cpu")
        config = EngineConfig(page_size=PAGE_SIZE, num_pages=64, dtype=dtype).sized_for("cpu")
        m = loaded.config
        cache = torch.zeros(
            config.num_pages, m.layers, 2, m.kv_heads, PAGE_SIZE, m.head_dim, dtype=loaded.model.cache_dtype
        )
        scheduler = Scheduler(PagePool(config.num_pages), config)
        self._engine = Engine(scheduler, ModelRunner(loaded.model, cache, config))
        # The file is float32 and holds the tied embedding once; a step reads every weight once.
        self.weight_bytes = sum(f.stat().st_size for f in weight_files(path)) // 4 * loaded.model.dtype.itemsize

    def generate(self, prompt: list[int], tokens: int) -> list[float]:
        """Seconds from the start to each token."""
        sequence = Sequence(
            request_id="bench",
            tokens=list(prompt),
            prompt_len=len(prompt),
            max_len=len(prompt) + tokens,
            sampling=SamplingParams(),
            end_ids=frozenset(),
            keys=page_keys(PageKey(bytes(16)), prompt, PAGE_SIZE),
            root=PageKey(bytes(16)),
        )
        started = time.perf_counter()
        self._engine.scheduler.add(sequence)
        times: list[float] = []
        while len(times) < tokens:
            times += [time.perf_counter() - started for p in self._engine.step() if p.token is not None]
        self._engine.scheduler.drop(sequence)
        return times


@dataclass
class Streamed:
    """One answer as the client saw it: seconds from the call to each token, and the router's stats."""

    times: list[float]
    stats: RequestStats


async def stream(client: Client, prompt: list[int], tokens: int) -> Streamed:
    started, times, stats = time.perf_counter(), [], None
    async for chunk in client.generate(token_ids=prompt, max_tokens=tokens, ignore_eos=True, deadline_s=600):
        times += [time.perf_counter() - started] * len(chunk.token_ids)
        stats = chunk.stats or stats
    assert len(times) == tokens
    assert stats is not None
    return Streamed(times, stats)


def tpot(times: list[float]) -> float:
    """Mean seconds a token after the first."""
    return (times[-1] - times[0]) / (len(times) - 1)


def read_rate(megabytes: int = 512) -> float:
    """Bytes a second that one thread reads from memory: the ceiling of a decode step."""
    data = torch.ones(megabytes << 18)

    def once() -> float:
        started = time.perf_counter()
        data.sum()
        return data.nbytes / (time.perf_counter() - started)

    return statistics.median(once() for _ in range(7))


async def measure_round(
    clients: dict[str, Client],
    alone: EngineAlone,
    peer: Transformers,
    prompts: Prompts,
    tokens: int,
    static_batch: bool,
) -> dict[str, float]:
    """One round: every figure once, ours and theirs next to each other."""
    figures: dict[str, float] = {}
    client, colocated = clients["split"], clients["colocated"]
    long = [prompts.take(PROMPT) for _ in range(4)]
    answer = await stream(client, long[0], 2)
    figures["ttft_512_ms.diptych"] = 1e3 * answer.times[0]
    # Beside the worker's own computing of the same prompt: a difference of two separate runs drowns in their noise.
    figures["ttft_512_ms.not_computing"] = figures["ttft_512_ms.diptych"] - answer.stats.prefill_ms
    figures["ttft_512_ms.colocated"] = 1e3 * (await stream(colocated, long[3], 2)).times[0]
    figures["ttft_512_ms.engine_alone"] = 1e3 * alone.generate(long[1], 1)[0]
    figures["ttft_512_ms.transformers"] = 1e3 * peer.generate([long[2]], 1)
    short = prompts.take(SHORT)
    figures["tpot_ms.diptych"] = 1e3 * tpot((await stream(client, short, tokens)).times)
    figures["tpot_ms.colocated"] = 1e3 * tpot((await stream(colocated, prompts.take(SHORT), tokens)).times)
    figures["tpot_ms.engine_alone"] = 1e3 * tpot(alone.generate(prompts.take(SHORT), tokens))
    first, rest = peer.generate([short], 1), peer.generate([short], tokens)
    figures["tpot_ms.transformers"] = 1e3 * (rest - first) / (tokens - 1)
    figures["tokens_per_s.1.transformers_sequential"] = tokens / rest
    for streams in STREAMS:
        batch = [prompts.take(SHORT) for _ in range(streams)]
        for name, one in (("diptych", client), ("colocated", colocated)):
            started = time.perf_counter()
            await asyncio.gather(*(stream(one, prompt, tokens) for prompt in batch))
            figures[f"tokens_per_s.{streams}.{name}"] = streams * tokens / (time.perf_counter() - started)
        if static_batch:
            figures[f"tokens_per_s.{streams}.transformers_static_batch"] = (
                streams * tokens / peer.generate(batch, tokens)
            )
    return figures


def derive(medians: dict[str, float], weight_bytes: int, rate: float) -> dict[str, float]:
    """Ratios, overhead, and the share of the memory's rate."""
    derived = {
        "tpot_transformers_over_diptych": medians["tpot_ms.transformers"] / medians["tpot_ms.diptych"],
        "ttft_transformers_over_diptych": medians["ttft_512_ms.transformers"] / medians["ttft_512_ms.diptych"],
        "cluster_overhead_in_ttft_ms": medians["ttft_512_ms.not_computing"],
        "ttft_less_engine_alone_ms": medians["ttft_512_ms.diptych"] - medians["ttft_512_ms.engine_alone"],
        "memory_read_gb_per_s": rate / 1e9,
        "share_of_memory_rate_in_decode": weight_bytes / (medians["tpot_ms.diptych"] / 1e3) / rate,
    }
    for streams in STREAMS:
        ours, sequential = medians[f"tokens_per_s.{streams}.diptych"], medians["tokens_per_s.1.transformers_sequential"]
        derived[f"tokens_per_s_{streams}_over_sequential"] = ours / sequential
    return derived


def diptych(*arguments: str) -> str:
    """Run the command line."""
    command = [Path(sys.executable).with_name("diptych"), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=900).stdout


@contextmanager
def cluster(dtype: str, mode: str) -> Iterator[str]:
    """Bring a cluster up as a user would, for its router's address, and take it down."""
    name = f"laptop-benchmark-{mode}"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        json.dump({"engine": {"dtype": dtype, "page_size": PAGE_SIZE, "num_pages": 512}}, config)
        config.flush()
        ports = ["--port", "0", "--operator-port", "0"]
        diptych("up", "--name", name, "--mode", mode, "--config", config.name, *ports)
    try:
        yield json.loads(diptych("status", "--name", name, "--json"))["routers"][0]
    finally:
        diptych("down", "--name", name)


async def run(addresses: dict[str, str], options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """`addresses` of routers by mode."""
    peer = Transformers(path, getattr(torch, options.dtype))
    alone = EngineAlone(path, options.dtype)
    prompts = Prompts(Tokenizer.from_dir(path))
    rounds = []
    async with Client(addresses["split"]) as split, Client(addresses["colocated"]) as colocated:
        clients = {"split": split, "colocated": colocated}
        await measure_round(clients, alone, peer, prompts, 4, static_batch=False)  # warm all sides up
        for index in range(options.rounds):
            static_batch = index < options.static_batch_rounds
            rounds.append(await measure_round(clients, alone, peer, prompts, options.tokens, static_batch))
            print(json.dumps(rounds[-1]), flush=True)
    names = rounds[0].keys()
    medians = {name: statistics.median(r[name] for r in rounds if name in r) for name in names}
    return {
        "medians": medians,
        "derived": derive(medians, alone.weight_bytes, read_rate()),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument(
        "--static-batch-rounds", type=int, default=5, help="rounds that run transformers' static batches too"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = hub.resolve(hub.DEMO_MODEL, print).path
    with ExitStack() as stack:
        addresses = {mode: stack.enter_context(cluster(options.dtype, mode)) for mode in ("split", "colocated")}
        result = asyncio.run(run(addresses, options, path))
    settings = vars(options) | {"prompt_tokens": PROMPT, "short_prompt_tokens": SHORT, "page_size": PAGE_SIZE}
    print(json.dumps(result["medians"] | result["derived"], indent=2))
    print(write_result(f"laptop_{options.dtype}", settings | result))


if __name__ == "__main__":
    main()

"""Our engine alone on one GPU, a Llama-3-8B shape with random weights: what a step costs, beside its floor.

    python -m benchmarks.engine

Decode: sequences are seated with pages of random numbers, as a decode worker seats them after a hand-over. The floor
is the time to read all weights but the embedding, and all K and V of the batch, at the rate at which this GPU reads
memory, measured in the same run. Prefill: prompts that share no prefix, saturated and one alone.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.attention_kernels import read_ceiling
from benchmarks.record import write_result
from engine.config import EngineConfig
from engine.device_runner import DeviceRunner
from engine.engine import Engine
from engine.loader import load_model
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from kvstore.keys import PageKey, page_keys
from kvstore.pool import PagePool

ROOT = PageKey(bytes(16))
MODEL = Path(__file__).parent / "configs" / "llama-3-8b.json"
PAGE = 64
DECODE = ((512, 1), (512, 16), (512, 64), (512, 256), (4096, 1), (4096, 16), (4096, 64), (4096, 96))  # context, batch
SAMPLINGS = {
    "greedy": SamplingParams(),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95, seed=7),
    "penalties": SamplingParams(temperature=0.8, top_p=0.95, frequency_penalty=0.5, logit_bias=((9, -1.0),), seed=7),
}
PREFILL = (512, 1024, 2048, 4096, 8192)
Json = dict[str, Any]


class Bench:
    """One engine; every measurement leaves it empty."""

    def __init__(self, token_budget: int) -> None:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(MODEL, Path(folder) / "config.json")
            self.loaded = load_model(folder, "bfloat16", "cuda", load="random")
        torch.cuda.synchronize()
        self.load_s = time.perf_counter() - began
        m = self.config = self.loaded.config
        pages = max(batch * (-(-context // PAGE) + 4) for context, batch in DECODE)
        shape = (pages, m.layers, 2, m.kv_heads, PAGE, m.head_dim)
        self.cache = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
        settings = EngineConfig(
            page_size=PAGE, num_pages=pages, token_budget=token_budget, max_sequences=256, max_waiting=4096
        )
        self.scheduler = Scheduler(PagePool(pages), settings, ROOT)
        began = time.perf_counter()
        self.runner = DeviceRunner(self.loaded.model, self.cache, settings)
        self.graphs_s = time.perf_counter() - began
        self.engine = Engine(self.scheduler, self.runner)
        self._next = 0

    def prompt(self, length: int) -> list[int]:
        self._next += 1
        return [self._next, *range(1000, 1000 + length - 1)]

    def sequence(self, length: int, answer_len: int, sampling: SamplingParams = SAMPLINGS["greedy"]) -> Sequence:
        tokens = self.prompt(length)
        return Sequence(
            request_id=str(self._next),
            tokens=tokens,
            prompt_len=length,
            max_len=length + answer_len,
            sampling=sampling,
            end_ids=frozenset(),
            keys=page_keys(ROOT, tokens, PAGE),
        )

    def seat(self, context: int, batch: int, steps: int, sampling: str = "greedy") -> list[Sequence]:
        """Sequences whose prompts are in pages already, as far as anybody can tell."""
        self.scheduler.pool.clear_cache()
        sequences = [self.sequence(context, steps + 2, SAMPLINGS[sampling]) for _ in range(batch)]
        for sequence in sequences:
            sequence.pages, sequence.credit = self.scheduler.pool.admit([], self.scheduler.pages_for(sequence))
            for _ in range(-(-context // PAGE)):
                sequence.pages.append(sequence.credit.take())
                self.scheduler.pool.begin_fill(sequence.pages[-1])
            self.scheduler.advance(sequence, context)
            sequence.tokens.append(7)
            self.scheduler.join(sequence)
        return sequences

    def clear(self) -> None:
        """Drop what runs, and read what is still under way."""
        for sequence in list(self.scheduler.running):
            self.scheduler.drop(sequence)
        self.engine.step()
        self.scheduler.pool.clear_cache()


def decode_row(
    bench: Bench, context: int, batch: int, floor_bytes_per_s: float, sampling: str = "greedy", steps: int = 48
) -> Json:
    """Milliseconds a token, from the host's clock over many steps; and what the host's thread computed meanwhile."""
    per_step, cpu = [], []
    bench.seat(context, batch, 3 * steps + 8, sampling)
    for _ in range(8):
        bench.engine.step()
    for _ in range(3):
        began, cpu_began = time.perf_counter(), time.thread_time()
        for _ in range(steps):
            bench.engine.step()
        per_step.append((time.perf_counter() - began) * 1e3 / steps)
        cpu.append((time.thread_time() - cpu_began) * 1e3 / steps)
    bench.clear()
    mean_context = context + 8 + 1.5 * steps
    m = bench.config
    kv_bytes = batch * mean_context * m.layers * 2 * m.kv_heads * m.head_dim * 2
    floor = (weight_bytes(m) + kv_bytes) / floor_bytes_per_s * 1e3
    tpot = statistics.median(per_step)
    return {
        "context": context,
        "batch": batch,
        "sampling": sampling,
        "tpot_ms": tpot,
        "floor_ms": floor,
        "over_floor": tpot / floor,
        "host_cpu_ms": statistics.median(cpu),
    }


def weight_bytes(m: Any) -> int:
    """What a decode step reads: all matrices but the embedding."""
    layer = m.hidden * (m.heads * m.head_dim * 2 + 2 * m.kv_heads * m.head_dim + 3 * m.ffn)
    return int((m.layers * layer + m.vocab * m.hidden) * 2)


def prefill_row(bench: Bench, length: int, tokens: int = 32768) -> Json:
    """Tokens a second over many prompts, and milliseconds of one alone to its first token."""
    count = max(4, tokens // length)
    saturated = [run_prompts(bench, length, count) for _ in range(3)]
    alone = [run_prompts(bench, length, 1) for _ in range(7)]
    return {
        "length": length,
        "tokens_per_s": count * length / statistics.median(saturated),
        "alone_ms": statistics.median(alone) * 1e3,
    }


def run_prompts(bench: Bench, length: int, count: int) -> float:
    """Seconds until each of the prompts has its first token."""
    prompts = [bench.sequence(length, 1) for _ in range(count)]
    torch.cuda.synchronize()
    began = time.perf_counter()
    for sequence in prompts:
        bench.scheduler.add(sequence)
    left = count
    while left:
        for progress in bench.engine.step():
            if progress.token is not None:
                left -= 1
                bench.scheduler.drop(progress.sequence)
    seconds = time.perf_counter() - began
    bench.clear()
    return seconds


def idle_row(bench: Bench, context: int, batch: int, steps: int = 30) -> Json:
    """The share of a steady decode in which no kernel and no copy ran, from the profiler's trace."""
    from torch.profiler import ProfilerActivity, profile

    bench.seat(context, batch, steps + 24)
    for _ in range(10):
        bench.engine.step()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        for _ in range(steps):
            bench.engine.step()
        torch.cuda.synchronize()
    bench.clear()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return {"context": context, "batch": batch, **idle_share(spans), "kernels": by_kernel(spans, steps)}


def idle_share(spans: list[tuple[float, float, str]]) -> Json:
    """Of the time from the first start to the last end."""
    first, reached, busy = spans[0][0], spans[0][0], 0.0
    for start, end, _ in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {"idle_share": 1 - busy / (reached - first), "span_ms": (reached - first) / 1e3}


def by_kernel(spans: list[tuple[float, float, str]], steps: int) -> dict[str, float]:
    """Milliseconds a step of each kernel, the longest first."""
    total: dict[str, float] = {}
    for start, end, name in spans:
        total[name[:60]] = total.get(name[:60], 0.0) + (end - start) / 1e3 / steps
    return dict(sorted(total.items(), key=lambda item: -item[1])[:16])


def main() -> None:
    """Measure everything, or the sections asked for; print each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="engine", help="of the result")
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--only", default="decode,sampling,idle,prefill", help="sections, with commas")
    args = parser.parse_args()
    sections: dict[str, Callable[[], list[Json]]] = {}
    imported = since_start()
    bench = Bench(args.token_budget)
    first = run_prompts(bench, 512, 1)
    start = {
        "import_s": imported,
        "load_s": bench.load_s,
        "graphs_s": bench.graphs_s,
        "first_prompt_s": first,
        "start_to_first_token_s": since_start(),
    }
    print("start", json.dumps(start), flush=True)
    read = read_ceiling()
    print(f"read ceiling {read:.0f} GB/s", flush=True)
    sections = {
        "decode": lambda: [decode_row(bench, context, batch, read * 1e9) for context, batch in DECODE],
        "sampling": lambda: [decode_row(bench, 512, 64, read * 1e9, sampling) for sampling in SAMPLINGS],
        "idle": lambda: [idle_row(bench, 512, 64)],
        "prefill": lambda: [prefill_row(bench, length) for length in PREFILL],
    }
    result: Json = {"gpu": gpu(), "start": start, "read_gb_per_s": read}
    for name in args.only.split(","):
        if name in sections:
            result[name] = sections[name]()
            print(*(f"{name} {json.dumps(row)}" for row in result[name]), sep="\n", flush=True)
            write_result(args.name, result)


def since_start() -> float:
    """Seconds that this process has lived."""
    return time.time() - psutil.Process().create_time()


def gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]


if __name__ == "__main__":
    main()

"""Our engine alone on one GPU, a Llama-3-8B shape with random weights: what a step costs, beside its floor.

    python -m benchmarks.engine

Decode: sequences are seated with pages of random numbers, as a decode worker seats them after a hand-over. The floor
is the time to read all weights but the embedding, and all K and V of the batch, at the rate at which this GPU reads
memory, measured in the same run. Prefill: prompts that share no prefix, saturated and one alone; the floor is every
product at the rate of one large one. `benchmarks.vllm_engine` measures the same of vLLM.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch

from benchmarks.attention_kernels import medians, read_ceiling
from benchmarks.engine_cells import (
    ALONE,
    DECODE,
    MODEL,
    PREFILL,
    SATURATED,
    STEPS,
    WARM,
    WINDOWS,
    Json,
    decode_floor_ms,
    prefill_floor_tokens_per_s,
)
from benchmarks.engine_trace import steps_of, summary, trace
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
PAGE = 64
SAMPLINGS = {
    "greedy": SamplingParams(),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95, seed=7),
    "penalties": SamplingParams(temperature=0.8, top_p=0.95, frequency_penalty=0.5, logit_bias=((9, -1.0),), seed=7),
}


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
        settings = self.settings = EngineConfig(
            page_size=PAGE, num_pages=pages, token_budget=token_budget, max_sequences=256, max_waiting=4096
        )
        self.scheduler = Scheduler(PagePool(pages), settings)
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
            root=ROOT,
        )

    def seat(self, context: int, batch: int, steps: int, sampling: str = "greedy") -> list[Sequence]:
        """Sequences whose prompts are in pages already, as far as anybody can tell."""
        self.scheduler.pool.clear_cache()
        sequences = [self.sequence(context, steps + 2, SAMPLINGS[sampling]) for _ in range(batch)]
        for sequence in sequences:
            self.scheduler.admit(sequence, [])
            assert sequence.credit is not None
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


def decode_row(bench: Bench, context: int, batch: int, read_gb_per_s: float, sampling: str = "greedy") -> Json:
    """Milliseconds a token, from the host's clock over many steps; and what was computed on the host meanwhile."""
    clocks = (time.perf_counter, time.thread_time, time.process_time)
    bench.seat(context, batch, WINDOWS * STEPS + WARM, sampling)
    for _ in range(WARM):
        bench.engine.step()
    windows = []
    for _ in range(WINDOWS):
        began = [clock() for clock in clocks]
        for _ in range(STEPS):
            bench.engine.step()
        windows.append([(clock() - since) * 1e3 / STEPS for clock, since in zip(clocks, began, strict=True)])
    bench.clear()
    tpot, thread, process = (statistics.median(column) for column in zip(*windows, strict=True))
    floor = decode_floor_ms(batch, context + WARM + WINDOWS * STEPS / 2, read_gb_per_s)
    return {
        "context": context,
        "batch": batch,
        "sampling": sampling,
        "tpot_ms": tpot,
        "floor_ms": floor,
        "over_floor": tpot / floor,
        "thread_cpu_ms": thread,
        "process_cpu_ms": process,
    }


def prefill_row(bench: Bench, length: int, tflops: float) -> Json:
    """Tokens a second over many prompts, and milliseconds of one alone to its first token."""
    count = max(4, SATURATED // length)
    saturated = [run_prompts(bench, length, count) for _ in range(WINDOWS)]
    alone = [run_prompts(bench, length, 1) for _ in range(ALONE)]
    rate, floor = count * length / statistics.median(saturated), prefill_floor_tokens_per_s(length, tflops)
    return {
        "length": length,
        "tokens_per_s": rate,
        "floor_tokens_per_s": floor,
        "over_floor": floor / rate,
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


def budget_row(bench: Bench, budget: int, length: int = 2048) -> Json:
    """What a step of so many tokens computes in a second, where many prompts wait."""
    whole = bench.scheduler, bench.engine
    bench.scheduler = Scheduler(PagePool(len(bench.cache)), replace(bench.settings, token_budget=budget))
    bench.engine = Engine(bench.scheduler, bench.runner)
    seconds = [run_prompts(bench, length, SATURATED // length) for _ in range(1 + WINDOWS)][1:]
    bench.scheduler, bench.engine = whole
    rate = SATURATED // length * length / statistics.median(seconds)
    return {"token_budget": budget, "length": length, "tokens_per_s": rate}


def decode_trace(bench: Bench, context: int, batch: int, steps: int = 30) -> Json:
    """Steps of steady decode, as the profiler saw them."""
    bench.seat(context, batch, steps + 24)
    for _ in range(10):
        bench.engine.step()
    spans = trace(lambda: [bench.engine.step() for _ in range(steps)])
    bench.clear()
    return {"step": "decode", "context": context, "batch": batch} | summary(steps_of(spans))


def prefill_trace(bench: Bench, length: int, count: int) -> Json:
    """One step that computes several prompts."""
    run_prompts(bench, length, count)  # kernels of this length are loaded
    spans = trace(lambda: run_prompts(bench, length, count))
    return {"step": "prefill", "context": length, "batch": count} | summary([spans])


def arithmetic_ceiling() -> float:
    """TFLOP/s of one product of 8,192 by 8,192 matrices in bfloat16."""
    n = 8192
    x, y = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * n**3 / medians({"product": [lambda: x @ y]})["product"] / 1e6


def main() -> None:
    """Measure everything, or the sections asked for; each row is shown as it comes, and what is there is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="engine", help="of the result")
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--only", default="decode,sampling,prefill,budget,trace", help="sections, with commas")
    args = parser.parse_args()
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
    read, tflops = read_ceiling(), arithmetic_ceiling()
    print(f"ceilings: {read:.0f} GB/s read, {tflops:.0f} TFLOP/s", flush=True)
    sections: dict[str, list[Callable[[], Json]]] = {
        "decode": [partial(decode_row, bench, context, batch, read) for context, batch in DECODE],
        "sampling": [partial(decode_row, bench, 512, 64, read, sampling) for sampling in SAMPLINGS],
        "prefill": [partial(prefill_row, bench, length, tflops) for length in PREFILL],
        "budget": [partial(budget_row, bench, budget) for budget in (256, 512, 1024, 2048, 4096, 8192)],
        "trace": [
            *(partial(decode_trace, bench, 512, batch) for batch in (1, 64, 256)),
            partial(prefill_trace, bench, 2048, 4),
        ],
    }
    result: Json = {"gpu": gpu(), "start": start, "read_gb_per_s": read, "tflops": tflops}
    write_result(args.name, result)
    for name in filter(None, args.only.split(",")):
        result[name] = []
        for measure in sections[name]:
            result[name].append(measure())
            print(name, json.dumps({k: v for k, v in result[name][-1].items() if k != "one_step"}), flush=True)
            write_result(args.name, result)


def since_start() -> float:
    """Seconds that this process has lived."""
    return time.time() - psutil.Process().create_time()


def gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]


if __name__ == "__main__":
    main()

"""Our attention kernels beside FlashAttention-3 and cuDNN, in one run on one Hopper GPU; medians, as JSON.

    make gpu-bench FA3=PATH/_vllm_fa3_C.abi3.so

FlashAttention-3 is the extension inside vLLM's wheel (its path is asked for; without it only cuDNN stands beside ours).
Every candidate runs in a CUDA graph of its own that lasts some milliseconds; the graphs take turns, in alternating
order, and a figure is the median over the turns: a GPU at its power limit changes its clock under us.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import commit
from kernels.attention_plan import AttentionPlan
from kernels.hopper_cascade import CascadeSchedule, cascade_pages
from kernels.hopper_decode import DecodeSchedule, decode_pages
from kernels.hopper_prefill import prefill_attention_hopper

HEADS, KV_HEADS, PAGE = 32, 8, 64
PREFILL_TOKENS = 16384
PREFILL_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Input lengths of successive requests of the Mooncake conversation trace; half of each is taken as cached.
TRACE_LENGTHS = (6758, 7322, 7236, 2290, 6760, 4834, 23141, 26888)
DECODE_CELLS = (
    (1, 1024), (1, 4096), (1, 16384), (1, 65536), (8, 1024), (8, 4096), (8, 16384),
    (32, 1024), (32, 4096), (32, 16384), (128, 1024), (128, 4096), (128, 16384),
)  # fmt: skip
CASCADE_CELLS = ((64, 8192, 256), (16, 8192, 256), (256, 2048, 256))  # sequences, shared tokens, tokens of its own each

Call = Callable[[], object]
Json = dict[str, Any]


def graph_of(calls: list[Call], milliseconds: float) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the calls in a row, over and over for about so long, and how many calls it holds."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    repeats = max(1, min(60, int(milliseconds / max(start.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, repeats * len(calls)


def medians(candidates: dict[str, list[Call]], milliseconds: float = 5.0, rounds: int = 9) -> dict[str, float]:
    """Microseconds of one call of each candidate."""
    graphs = {name: graph_of(calls, milliseconds) for name, calls in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 1):  # the first warms up and does not count
        for name in list(graphs) if turn % 2 else list(graphs)[::-1]:
            graph, calls_in_it = graphs[name]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) * 1e3 / calls_in_it)
    return {name: statistics.median(t) for name, t in times.items()}


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the reference's."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())


class Fa3:
    """FlashAttention-3's forward out of vLLM's extension."""

    def __init__(self, path: str) -> None:
        torch.ops.load_library(path)
        self._forward = torch.ops._vllm_fa3_C.fwd
        self._schedule = torch.ops._vllm_fa3_C.get_scheduler_metadata

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
        """Packed sequences with K and V of their own, each [tokens, heads, d]."""
        return self._call(q, k, v, starts, starts, None, longest, longest, None, None)

    def paged_prefill(self, q: Tensor, cache: Tensor, layer: int, plan: AttentionPlan) -> Tensor:
        """Chunks over pages; K and V are views of the same pool."""
        k, v = (cache[:, layer, i].transpose(1, 2) for i in (0, 1))
        rows, keys = max(plan.queries), max(plan.contexts)
        return self._call(q, k, v, plan.query_starts, None, plan.context_lens, rows, keys, plan.page_table, None)

    def decode(self, q: Tensor, cache: Tensor, plan: AttentionPlan) -> list[Call]:
        """One call a layer; its own schedule is made once, as an engine makes it once a step."""
        seqs, heads, d = q.shape
        starts, longest = plan.query_starts, max(plan.contexts)
        schedule = self._schedule(
            seqs, 1, longest, heads, cache.shape[3], d, d, q.dtype, plan.context_lens, starts,
            None, None, None, None, plan.page_size, 0, True, -1, -1, False, 0, None, 0,
        )  # fmt: skip

        def call(layer: int) -> Tensor:
            k, v = (cache[:, layer, i].transpose(1, 2) for i in (0, 1))
            return self._call(q, k, v, starts, None, plan.context_lens, 1, longest, plan.page_table, schedule)

        return [lambda layer=layer: call(layer) for layer in range(cache.shape[1])]

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor | None, contexts: Tensor | None,
        rows: int, keys: int, table: Tensor | None, schedule: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out: Tensor = self._forward(
            q, k, v, None, None, None, None, starts, key_starts, None, None, contexts, rows, keys, table,
            None, None, None, None, None, None, None, None, q.shape[-1] ** -0.5, True, -1, -1, 0.0, True, schedule,
            0, None, 0, None, 1, 0, None,
        )[0]  # fmt: skip
        return out


def make_plan(queries: list[int], contexts: list[int], num_decodes: int) -> tuple[AttentionPlan, int]:
    """A plan over shuffled pages, and how many pages it uses."""
    used = [-(-n // PAGE) for n in contexts]
    order = torch.randperm(sum(used), device="cuda").to(torch.int32)
    table = torch.zeros(len(contexts), max(used), dtype=torch.int32, device="cuda")
    for row, part in enumerate(torch.split(order, used)):
        table[row, : len(part)] = part
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32).cuda()
    lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    return AttentionPlan(table, starts, lens, num_decodes, PAGE), sum(used)


def prefill_row(d: int, length: int, fa3: Fa3 | None) -> Json:
    """TFLOP/s of causal self-attention of 16,384 tokens in sequences of one length."""
    seqs = PREFILL_TOKENS // length
    plan, pages = make_plan([length] * seqs, [length] * seqs, 0)
    q = torch.randn(PREFILL_TOKENS, HEADS, d, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(pages, 1, 2, KV_HEADS, PAGE, d, device="cuda", dtype=torch.bfloat16)
    kv = cache[plan.page_table.long(), 0].permute(2, 0, 1, 4, 3, 5)  # [2, seqs, pages, page_size, kv_heads, d]
    k, v = kv.reshape(2, seqs, length, KV_HEADS, d).unbind(0)
    heads_first = [t.view(seqs, length, -1, d).transpose(1, 2) for t in (q, k, v)]

    def cudnn() -> Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)

    candidates: dict[str, Call] = {
        "ours": lambda: prefill_attention_hopper(q, cache, 0, plan),
        "cudnn": cudnn,
    }
    if fa3 is not None:
        flat = [t.reshape(PREFILL_TOKENS, KV_HEADS, d) for t in (k, v)]
        candidates["fa3"] = lambda: fa3.prefill(q, flat[0], flat[1], plan.query_starts, length)
        candidates["fa3_paged"] = lambda: fa3.paged_prefill(q, cache, 0, plan)
    error = relative_error(prefill_attention_hopper(q, cache, 0, plan), cudnn().transpose(1, 2).reshape(q.shape))
    times = medians({name: [call] for name, call in candidates.items()})
    operations = 4.0 * seqs * length * length * HEADS * d / 2
    return {
        "head_dim": d,
        "seq": length,
        "error_to_cudnn": error,
        "tflops": {n: operations / t / 1e6 for n, t in times.items()},
    }


def ragged_row(d: int, fa3: Fa3 | None) -> Json:
    """TFLOP/s of a mix of real lengths, the first half of each already in pages."""
    queries = [n - n // 2 for n in TRACE_LENGTHS]
    plan, pages = make_plan(queries, list(TRACE_LENGTHS), 0)
    q = torch.randn(sum(queries), HEADS, d, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(pages, 1, 2, KV_HEADS, PAGE, d, device="cuda", dtype=torch.bfloat16)
    candidates: dict[str, Call] = {"ours": lambda: prefill_attention_hopper(q, cache, 0, plan)}
    error = math.nan
    if fa3 is not None:
        candidates["fa3_paged"] = lambda: fa3.paged_prefill(q, cache, 0, plan)
        error = relative_error(prefill_attention_hopper(q, cache, 0, plan), fa3.paged_prefill(q, cache, 0, plan))
    pairs = sum(r * (n - r) + r * r / 2 for r, n in zip(queries, TRACE_LENGTHS, strict=True))
    times = medians({name: [call] for name, call in candidates.items()})
    tflops = {name: 4.0 * pairs * HEADS * d / t / 1e6 for name, t in times.items()}
    return {"head_dim": d, "contexts": list(TRACE_LENGTHS), "queries": queries, "error_to_fa3": error, "tflops": tflops}


def decode_row(seqs: int, context: int, fa3: Fa3 | None) -> Json:
    """Microseconds a call and GB/s of K and V, over enough layers that no cache holds them."""
    d = 128
    kv_bytes = seqs * context * KV_HEADS * d * 2 * 2
    layers = max(1, min(32, math.ceil(600e6 / kv_bytes)))
    plan, pages = make_plan([1] * seqs, [context] * seqs, seqs)
    q = torch.randn(seqs, HEADS, d, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(pages, layers, 2, KV_HEADS, PAGE, d, device="cuda", dtype=torch.bfloat16)
    schedule = DecodeSchedule(plan.context_lens, HEADS, KV_HEADS, d)

    def ours(overlap: bool) -> list[Call]:
        return [
            lambda layer=layer: decode_pages(q, cache, layer, plan.page_table, schedule, overlap_previous=overlap)
            for layer in range(layers)
        ]

    candidates = {"ours": ours(False), "ours_overlapped": ours(True)}
    invariant = DecodeSchedule(plan.context_lens, HEADS, KV_HEADS, d, batch_invariant=True)
    candidates["ours_batch_invariant"] = [
        lambda layer=layer: decode_pages(q, cache, layer, plan.page_table, invariant) for layer in range(layers)
    ]
    error = math.nan
    if fa3 is not None:
        candidates["fa3"] = fa3.decode(q, cache, plan)
        expected = candidates["fa3"][-1]()
        assert isinstance(expected, Tensor)
        error = relative_error(decode_pages(q, cache, layers - 1, plan.page_table, schedule), expected.view(q.shape))
    times = medians(candidates, milliseconds=2.0)
    return {
        "batch": seqs,
        "context": context,
        "error_to_fa3": error,
        "microseconds": times,
        "gb_per_s": {name: kv_bytes / t / 1e3 for name, t in times.items()},
    }


def cascade_row(seqs: int, prefix: int, own: int) -> Json:
    """Microseconds of a decode call over a common prefix, beside our own plain decode; GB/s as if both read it once."""
    d, layers = 128, 10
    kv_bytes = (prefix + seqs * own) * KV_HEADS * d * 2 * 2
    order = torch.randperm((prefix + seqs * own) // PAGE, device="cuda").to(torch.int32)
    shared, rest = order[: prefix // PAGE], order[prefix // PAGE :]
    table = torch.cat((shared.expand(seqs, -1), rest.view(seqs, -1)), 1)  # [seqs, pages]
    lens = torch.full((seqs,), prefix + own, dtype=torch.int32, device="cuda")
    q = torch.randn(seqs, HEADS, d, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(len(order), layers, 2, KV_HEADS, PAGE, d, device="cuda", dtype=torch.bfloat16)
    cascade = CascadeSchedule(lens, lens.new_full((1,), prefix), HEADS, KV_HEADS, d)
    plain = DecodeSchedule(lens, HEADS, KV_HEADS, d)
    candidates: dict[str, list[Call]] = {
        "ours": [lambda layer=layer: cascade_pages(q, cache, layer, table, cascade) for layer in range(layers)],
        "plain": [lambda layer=layer: decode_pages(q, cache, layer, table, plain) for layer in range(layers)],
    }
    error = relative_error(cascade_pages(q, cache, 0, table, cascade), decode_pages(q, cache, 0, table, plain))
    times = medians(candidates, milliseconds=2.0)
    return {
        "batch": seqs,
        "prefix": prefix,
        "own": own,
        "error_to_plain": error,
        "microseconds": times,
        "gb_per_s": {name: kv_bytes / t / 1e3 for name, t in times.items()},
    }


@triton.jit
def _read(X, Out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    seen = tl.zeros([BLOCK], tl.int32)
    for i in range(STEPS):
        seen ^= tl.load(X + first + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(Out + tl.program_id(0), tl.sum(seen, 0))


def read_ceiling() -> float:
    """GB/s of reading 8 GiB once."""
    steps, block = 16, 4096
    x = torch.empty(2 << 30, dtype=torch.int32, device="cuda").random_()
    programs = x.numel() // (steps * block)
    out = torch.empty(programs, dtype=torch.int32, device="cuda")
    times = medians({"read": [lambda: _read[(programs,)](x, out, STEPS=steps, BLOCK=block, num_warps=8)]})
    return x.numel() * 4 / times["read"] / 1e3


def device_row() -> Json:
    """What ran, and where."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    return {
        "device": card,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python3", *sys.orig_argv[1:]]),
        "shape": f"GQA {HEADS}/{KV_HEADS}, bfloat16, pages of {PAGE} tokens",
    }


def show(row: Json) -> None:
    """One line: the figures, and ours over the best peer's."""
    rates = row.get("tflops") or row["gb_per_s"]
    peers = [rate for name, rate in rates.items() if not name.startswith("ours")]
    label = {k: v for k, v in row.items() if isinstance(v, int)}
    ratio = f" ours/best peer {rates['ours'] / max(peers):.3f}" if peers else ""
    figures = " ".join(f"{n}={r:.0f}" for n, r in rates.items())
    times = " ".join(f"{n}={t:.1f}us" for n, t in row.get("microseconds", {}).items())
    error = next(value for name, value in row.items() if name.startswith("error"))
    print(label, figures, times, ratio, f"err {error:.1e}", flush=True)


def main() -> None:
    """Run the sections asked for and write what they give after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fa3", help="vLLM's FlashAttention-3 extension")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"))
    parser.add_argument("--only", default="prefill,ragged,decode,cascade", help="sections, with commas")
    parser.add_argument("--deadline", type=float, default=540, help="seconds after which no row is begun")
    args = parser.parse_args()
    fa3 = Fa3(args.fa3) if args.fa3 else None
    torch.manual_seed(0)
    results: Json = {
        "meta": device_row(),
        "read_gb_per_s": read_ceiling(),
        "prefill": [],
        "ragged": [],
        "decode": [],
        "cascade": [],
    }
    print(results["meta"], f"read ceiling {results['read_gb_per_s']:.0f} GB/s", flush=True)
    rows: list[tuple[str, Callable[[], Json]]] = [
        *(("prefill", lambda d=d, n=n: prefill_row(d, n, fa3)) for d in (128, 64) for n in PREFILL_LENGTHS),
        *(("ragged", lambda d=d: ragged_row(d, fa3)) for d in (128, 64)),
        *(("decode", lambda b=b, n=n: decode_row(b, n, fa3)) for b, n in DECODE_CELLS),
        *(("cascade", lambda cell=cell: cascade_row(*cell)) for cell in CASCADE_CELLS),
    ]
    began = time.monotonic()
    for section, row in rows:
        if section in args.only.split(",") and time.monotonic() - began < args.deadline:
            results[section].append(row())
            show(results[section][-1])
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Our sampling kernel beside sampling by torch (argmax, multinomial, sort), in one run on one GPU; medians, as JSON.

    PYTHONPATH=. python -m benchmarks.sampling --out benchmarks/results/sampling.json

Every candidate runs in a CUDA graph over logits that together exceed the GPU's second-level cache; the graphs take
turns.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.record import commit
from kernels.sample import sample
from kernels.sample_log_probs import log_probs
from kernels.sample_rows import SamplingRows

VOCAB = 128256
ROWS = (1, 16, 64, 256)
POOL = 256 << 20  # bytes of logits

Call = Callable[[Tensor], object]


def ours(rows: int, *, penalties: bool = False, greedy: bool = False, **settings: float) -> Call:
    state = SamplingRows.neutral(rows, VOCAB, 16 if penalties else 0, torch.device("cuda"), counts=penalties)
    state.seeds.copy_(torch.arange(rows))
    for name, value in settings.items():
        getattr(state, name).fill_(value)
    if penalties:
        state.bias_ids.copy_(torch.randint(VOCAB, state.bias_ids.shape))
    return lambda logits: sample(logits, state, greedy=greedy)


def multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1)


def sorted_top_p(logits: Tensor) -> Tensor:
    values, ids = logits.softmax(-1).sort(-1, descending=True)
    values[values.cumsum(-1) - values > 0.9] = 0
    return ids.gather(1, torch.multinomial(values, 1))


def top_k(logits: Tensor) -> Tensor:
    values, ids = logits.topk(50)
    return ids.gather(1, torch.multinomial(values.softmax(-1), 1))


def candidates(rows: int) -> dict[str, Call]:
    ids = torch.zeros(rows, dtype=torch.int64, device="cuda")
    return {
        "greedy": ours(rows, greedy=True),
        "greedy among rows that draw": ours(rows),
        "temperature": ours(rows, temperature=1.0),
        "min_p 0.05": ours(rows, temperature=1.0, min_p=0.05),
        "top_p 0.9": ours(rows, temperature=1.0, top_p=0.9),
        "top_k 50": ours(rows, temperature=1.0, top_k=50),
        "top_k 50, top_p 0.9": ours(rows, temperature=1.0, top_k=50, top_p=0.9),
        "all, with bias and penalties": ours(
            rows, penalties=True, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, frequency_penalty=0.5
        ),
        "log-probabilities": lambda logits: log_probs(logits, ids),
        "log-probabilities, top 20": lambda logits: log_probs(logits, ids, 20),
        "torch argmax": lambda logits: logits.argmax(-1),
        "torch multinomial": multinomial,
        "torch sort, top_p 0.9": sorted_top_p,
        "torch topk 50": top_k,
        "torch log_softmax": lambda logits: logits.log_softmax(-1),
    }


def graph_of(call: Call, pool: Tensor) -> torch.cuda.CUDAGraph:
    """One call on each of the pool's logits."""
    call(pool[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for logits in pool:
            call(logits)
    return graph


def measure(rows: int, deviation: float, rounds: int) -> dict[str, float]:
    """Microseconds of a call on normally distributed logits."""
    pool = torch.randn(max(2, min(100, POOL // (rows * VOCAB * 4))), rows, VOCAB, device="cuda") * deviation
    graphs = {name: graph_of(call, pool) for name, call in candidates(rows).items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 1):  # the first warms up and does not count
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) * 1000 / len(pool))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    result = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "vocab": VOCAB,
        "microseconds by deviation of the logits, then by rows": {
            str(deviation): {str(rows): measure(rows, deviation, arguments.rounds) for rows in ROWS}
            for deviation in (1.0, 3.0)
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

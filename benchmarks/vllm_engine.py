"""vLLM under the loads of `benchmarks.engine`, on the same GPU, to stand beside it.

    PYTHONPATH=.:FOLDER_WITH_VLLM python -m benchmarks.vllm_engine

vLLM is no dependency of ours: it must be on the path, and everything else is imported late, so that its start is its
own. It runs as it comes (torch.compile, CUDA graphs, asynchronous scheduling, its engine in a process of its own), but
for its prefix cache, which these prompts would not hit, and its sampler, which is the one that needs no compiler.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine_cells import ALONE, DECODE, MODEL, PREFILL, SATURATED, STEPS, WARM, WINDOWS, Json
from benchmarks.record import write_result

_LEAST_BUDGET = 8192  # tokens of one of its steps, at least: how far apart a batch's prompts are computed
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


@dataclass(frozen=True)
class Step:
    """What came out of the engine at once."""

    at: float  # seconds
    cpu: float  # seconds that its process had computed by then
    tokens: int


class Peer:
    """One engine; every run leaves it empty."""

    def __init__(self, folder: str) -> None:
        import vllm

        _write_config(Path(folder))
        self.version: str = vllm.__version__
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=max(PREFILL) + 64,
            max_num_seqs=max(batch for _, batch in DECODE),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self._engine: Any = llm.llm_engine
        self._params = partial(vllm.SamplingParams, temperature=0.0, ignore_eos=True, detokenize=False)
        self._next = 0
        self._processes = psutil.Process().children(recursive=True)

    def settings(self) -> Json:
        """What it chose."""
        config = self._engine.vllm_config
        return {
            "tokens_of_a_step": config.scheduler_config.max_num_batched_tokens,
            "asynchronous": config.scheduler_config.async_scheduling,
            "graph_sizes": str(config.compilation_config.cudagraph_capture_sizes),
        }

    def run(self, length: int, answer: int, count: int) -> tuple[float, list[Step]]:
        """Seconds for so many prompts and their answers, and the steps in which tokens came."""
        began, params = time.perf_counter(), self._params(max_tokens=answer)
        for _ in range(count):
            self._next += 1
            prompt = {"prompt_token_ids": [self._next, *range(1000, 1000 + length - 1)]}
            self._engine.add_request(str(self._next), prompt, params)
        steps: list[Step] = []
        known: dict[str, int] = {}
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            lengths = {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
            tokens = sum(lengths.values()) - sum(known.get(request, 0) for request in lengths)
            known |= lengths
            if tokens:
                steps.append(Step(time.perf_counter(), self._cpu(), tokens))
        return time.perf_counter() - began, steps

    def _cpu(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return sum(t.user + t.system for t in times)


def decode_row(peer: Peer, context: int, batch: int) -> Json:
    """Milliseconds a token while the whole batch decodes, and the CPU time of the engine's process a step."""
    wanted = WARM + WINDOWS * STEPS + 1
    spread = batch * context // _LEAST_BUDGET + 8  # steps between the first prompt's token and the last one's
    _, steps = peer.run(context, wanted + spread, batch)
    first = whole_batch(steps, batch, wanted) + WARM
    marks = [steps[first + window * STEPS] for window in range(WINDOWS + 1)]
    before = sum(step.tokens for step in steps[:first]) / batch
    return {
        "context": context,
        "batch": batch,
        "mean_context": context + before + WINDOWS * STEPS / 2,
        "tpot_ms": statistics.median((b.at - a.at) * 1e3 / STEPS for a, b in pairwise(marks)),
        "process_cpu_ms": (marks[-1].cpu - marks[0].cpu) * 1e3 / (WINDOWS * STEPS),
    }


def whole_batch(steps: Sequence[Step], batch: int, wanted: int) -> int:
    """The first of so many steps in a row that each brought every sequence a token. Raises `RuntimeError`."""
    row = 0
    for i, step in enumerate(steps):
        row = row + 1 if step.tokens == batch else 0
        if row == wanted:
            return i + 1 - wanted
    raise RuntimeError(f"the batch of {batch} was never whole for {wanted} steps")


def prefill_row(peer: Peer, length: int) -> Json:
    """Tokens a second over many prompts, and milliseconds of one alone to its first token."""
    count = max(4, SATURATED // length)
    seconds = statistics.median(peer.run(length, 1, count)[0] for _ in range(WINDOWS))
    alone = statistics.median(peer.run(length, 1, 1)[0] for _ in range(ALONE))
    return {"length": length, "tokens_per_s": count * length / seconds, "alone_ms": alone * 1e3}


def _write_config(folder: Path) -> None:
    """Our shape, with room for the longest prompt's answer."""
    config = json.loads(MODEL.read_text()) | {"max_position_embeddings": 2 * max(PREFILL)}
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    """Measure everything; each row is shown as it comes, and what is there is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="engine_vllm", help="of the result")
    args = parser.parse_args()
    os.environ |= _ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(folder)
        ready = since_start()
        peer.run(512, 1, 1)
        start = {"ready_s": ready, "start_to_first_token_s": since_start()}
        result: Json = {"vllm": peer.version, "settings": peer.settings(), "start": start, "decode": [], "prefill": []}
        print("start", json.dumps(start), json.dumps(result["settings"]), flush=True)
        peer.run(64, 8, 8)  # whatever it still does at its first steps
        for name, measure in [
            *(("decode", partial(decode_row, peer, *cell)) for cell in DECODE),
            *(("prefill", partial(prefill_row, peer, length)) for length in PREFILL),
        ]:
            result[name].append(measure())
            print(name, json.dumps(result[name][-1]), flush=True)
            write_result(args.name, result)


def since_start() -> float:
    """Seconds that this process has lived."""
    return time.time() - psutil.Process().create_time()


if __name__ == "__main__":
    main()

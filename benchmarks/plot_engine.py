"""Draws engine.json and engine_vllm.json of benchmarks/results, and prints the tables of docs/performance.md.

python -m benchmarks.plot_engine
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from benchmarks.engine_trace import KINDS

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "engine"  # the same file from the same figures

RESULTS = Path(__file__).parent / "results"
OURS, PEER, FLOOR = "#b4521e", "#5b7f95", "black"
COLOURS = dict(zip(KINDS, ("#7a5195", "#b4521e", "#5b7f95", "#c9a227"), strict=True))
IDLE = "#d9d9d9"
LAYERS_SHOWN = 2.2  # of a step, in the middle
Json = dict[str, Any]


def plot_decode(ours: Json, peer: Json) -> None:
    """TPOT of every cell, and the floor as a line across its bars."""
    figure, panel = plt.subplots(figsize=(9, 3.6), layout="constrained")
    rows, theirs = ours["decode"], {(r["context"], r["batch"]): r["tpot_ms"] for r in peer["decode"]}
    places = list(range(len(rows)))
    panel.bar([p - 0.2 for p in places], [r["tpot_ms"] for r in rows], 0.4, color=OURS, label="Diptych's engine")
    heights = [theirs.get((r["context"], r["batch"]), 0) for r in rows]
    panel.bar([p + 0.2 for p in places], heights, 0.4, color=PEER, label=f"vLLM {peer['vllm']}")
    panel.hlines([r["floor_ms"] for r in rows], [p - 0.42 for p in places], [p + 0.42 for p in places], FLOOR)
    panel.plot([], [], color=FLOOR, label="weights and K and V, read once")
    panel.set_xticks(places, [f"{r['context']:,}\nx {r['batch']}" for r in rows])
    panel.set(ylabel="ms a token", xlabel="context x batch", title=f"decode: {ours['gpu'].split(',')[0]}")
    panel.legend()
    _save(figure, "engine_decode")


def plot_prefill(ours: Json, peer: Json) -> None:
    """Tokens a second of prompts of every length."""
    figure, panel = plt.subplots(figsize=(6, 3.6), layout="constrained")
    rows = ours["prefill"]
    at = [f"{row['length']:,}" for row in rows]
    panel.plot(at, [r["floor_tokens_per_s"] / 1e3 for r in rows], ":", color=FLOOR, label="at a large product's rate")
    panel.plot(at, [r["tokens_per_s"] / 1e3 for r in rows], "o-", color=OURS, label="Diptych's engine")
    theirs = peer["prefill"]
    label = f"vLLM {peer['vllm']}"
    at = [f"{row['length']:,}" for row in theirs]
    panel.plot(at, [r["tokens_per_s"] / 1e3 for r in theirs], "s-", color=PEER, label=label)
    panel.set(ylabel="thousand tokens/s", xlabel="tokens a prompt", title="prefill, saturated", ylim=0)
    panel.legend()
    _save(figure, "engine_prefill")


def plot_steps(ours: Json) -> None:
    """For each traced step: two layers in its middle as they ran, and the whole of it by kind."""
    rows = ours["trace"]
    figure, panels = plt.subplots(
        len(rows), 2, figsize=(10, 1.7 * len(rows)), width_ratios=(3, 2), squeeze=False, layout="constrained"
    )
    for (left, right), row in zip(panels, rows, strict=True):
        _draw_middle(left, row)
        _draw_kinds(right, row, _floor_ms(ours, row))
    panels[-1][0].set_xlabel("microseconds")
    panels[-1][1].set_xlabel("ms of the whole step")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (*COLOURS.values(), IDLE)]
    figure.legend(handles, [*COLOURS, "nothing runs"], loc="outside upper center", ncols=5, frameon=False)
    _save(figure, "engine_steps")


def _draw_middle(panel: Any, row: Json) -> None:
    step = row["one_step"]
    length = step["start_us"][-1] + step["length_us"][-1]
    begin = length / 2
    end = begin + length * LAYERS_SHOWN / 32
    panel.axvspan(0, end - begin, color=IDLE)
    for start, took, kind in zip(step["start_us"], step["length_us"], step["kind"], strict=True):
        if start < end and start + took > begin:
            # A kernel that starts early waits for its predecessor, which is drawn over it.
            colour = list(COLOURS.values())[kind]
            panel.barh(
                0,
                took,
                left=start - begin,
                height=1,
                color=colour,
                edgecolor="white",
                lw=0.3,
                zorder=2 + 1 / (1 + start),
            )
    panel.set(xlim=(0, end - begin), ylim=(-0.5, 0.5), yticks=[])
    of = "one prompt" if row["batch"] == 1 else f"{row['batch']} prompts"
    what = f"batch {row['batch']}, context {row['context']}" if row["step"] == "decode" else f"{of} of {row['context']}"
    panel.set_title(f"{row['step']}, {what}: two of 32 layers", fontsize=9)


def _draw_kinds(panel: Any, row: Json, floor_ms: float) -> None:
    at = 0.0
    for kind, ms in row["by_kind_ms"].items():
        panel.barh(0, ms, left=at, height=1, color=COLOURS[kind])
        at += ms
    panel.barh(0, row["step_ms"] - at, left=at, height=1, color=IDLE)
    panel.axvline(floor_ms, color=FLOOR, ls="--")
    panel.set(xlim=(0, None), ylim=(-0.5, 0.5), yticks=[])
    panel.set_title(f"{row['step_ms']:.2f} ms, idle {row['idle_share']:.1%}; dashed: the floor", fontsize=9)


def _floor_ms(ours: Json, row: Json) -> float:
    if row["step"] == "decode":
        [cell] = [r for r in ours["decode"] if (r["context"], r["batch"]) == (row["context"], row["batch"])]
        return float(cell["floor_ms"])
    [cell] = [r for r in ours["prefill"] if r["length"] == row["context"]]
    return float(row["context"] * row["batch"] / cell["floor_tokens_per_s"] * 1e3)


def _save(figure: Any, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


def decode_table(ours: Json, peer: Json) -> list[list[str]]:
    rows, theirs = ours["decode"], {(r["context"], r["batch"]): r for r in peer["decode"]}
    beside = [theirs.get((r["context"], r["batch"])) for r in rows]
    return [
        ["context x batch", *(f"{r['context']:,} x {r['batch']}" for r in rows)],
        ["TPOT, ms", *(f"{r['tpot_ms']:.2f}" for r in rows)],
        ["vLLM's, ms", *(f"{r['tpot_ms']:.2f}" if r else "" for r in beside)],
        ["over the floor", *(f"{r['over_floor']:.2f}" for r in rows)],
        ["CPU time a step of the engine's thread, ms", *(f"{r['thread_cpu_ms']:.2f}" for r in rows)],
        ["of the process, ms", *(f"{r['process_cpu_ms']:.2f}" for r in rows)],
        ["of vLLM's engine process, ms", *(f"{r['process_cpu_ms']:.2f}" if r else "" for r in beside)],
    ]


def prefill_table(ours: Json, peer: Json) -> list[list[str]]:
    rows, theirs = ours["prefill"], {r["length"]: r for r in peer["prefill"]}
    beside = [theirs.get(r["length"]) for r in rows]
    return [
        ["tokens a prompt", *(f"{r['length']:,}" for r in rows)],
        ["tokens/s, saturated", *(f"{r['tokens_per_s']:,.0f}" for r in rows)],
        ["vLLM's", *(f"{r['tokens_per_s']:,.0f}" if r else "" for r in beside)],
        ["of a large product's rate", *(f"{1 / r['over_floor']:.2f}" for r in rows)],
        ["one alone, ms", *(f"{r['alone_ms']:.1f}" for r in rows)],
        ["vLLM's, ms", *(f"{r['alone_ms']:.1f}" if r else "" for r in beside)],
    ]


def show(table: list[list[str]]) -> None:
    head, *rows = table
    print("", *("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)), sep="\n")


def main() -> None:
    ours, peer = (json.loads((RESULTS / name).read_text()) for name in ("engine.json", "engine_vllm.json"))
    plot_decode(ours, peer)
    plot_prefill(ours, peer)
    plot_steps(ours)
    show(decode_table(ours, peer))
    show(prefill_table(ours, peer))
    for name, result in (("ours", ours), ("vLLM", peer)):
        print(f"\n{name}, seconds since the process began:", json.dumps(result["start"]))


if __name__ == "__main__":
    main()

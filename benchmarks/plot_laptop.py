"""Draws benchmarks/results/laptop_*.json: `python -m benchmarks.plot_laptop`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
OURS, THEIRS = "#b4521e", "#8a94a6"


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("laptop_*.json"))]
    figure, rows = plt.subplots(len(results), 3, figsize=(11, 3.1 * len(results)), squeeze=False)
    for axes, result in zip(rows, results, strict=True):
        draw(axes, result["medians"], result["dtype"])
    device = results[0]["device"]
    figure.suptitle(f"SmolLM2-135M, one thread a process, {device['cpu']}, medians", fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULTS / "laptop.png", dpi=110)


def draw(axes, medians: dict[str, float], dtype: str) -> None:
    """One row: TTFT, TPOT and throughput, ours beside transformers'."""
    for axis, name, title in ((axes[0], "ttft_512_ms", "TTFT, 512 tokens (ms)"), (axes[1], "tpot_ms", "TPOT (ms)")):
        axis.bar(
            ["Diptych", "transformers"],
            [medians[f"{name}.diptych"], medians[f"{name}.transformers"]],
            color=[OURS, THEIRS],
        )
        axis.set_title(f"{title}, {dtype}", fontsize=9)
    labels = ["1, sequential", "8, static", "32, static", "8, Diptych", "32, Diptych"]
    values = [medians["tokens_per_s.1.transformers_sequential"]]
    values += [medians.get(f"tokens_per_s.{n}.transformers_static_batch", 0.0) for n in (8, 32)]
    values += [medians[f"tokens_per_s.{n}.diptych"] for n in (8, 32)]
    axes[2].bar(labels, values, color=[THEIRS] * 3 + [OURS] * 2)
    axes[2].tick_params(axis="x", labelrotation=25, labelsize=7)
    axes[2].set_title(f"output tokens/s by streams, {dtype}", fontsize=9)


if __name__ == "__main__":
    main()

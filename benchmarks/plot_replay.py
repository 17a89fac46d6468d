"""Draws benchmarks/results/replay_*.json: `python -m benchmarks.plot_replay`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
STYLES = {
    "lru": ("#8a6d3b", "-", "least recently used"),
    "reuse": ("#b4521e", "-", "by learned reuse"),
    "belady": ("#5b7f95", ":", "knowing what comes"),
}


def main() -> None:
    paths = sorted(RESULTS.glob("replay_*.json"))
    figure, axes = plt.subplots(1, len(paths), figsize=(4.6 * len(paths), 3.4), squeeze=False)
    for axis, path in zip(axes[0], paths, strict=True):
        everything, *rows = json.loads(path.read_text())["rows"]
        for policy, (colour, style, label) in STYLES.items():
            line = [row for row in rows if row["policy"] == policy]
            axis.plot(
                [r["pages"] for r in line], [r["hit_rate"] for r in line], style, marker=".", color=colour, label=label
            )
        axis.axhline(everything["hit_rate"], color="#999999", linewidth=0.7)
        axis.set_title(path.stem.removeprefix("replay_").replace("_", " "), fontsize=9)
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("pages (blocks of 512 tokens) in the pool", fontsize=8)
        axis.set_ylabel("share of blocks found", fontsize=8)
        axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(RESULTS / "replay.svg")


if __name__ == "__main__":
    main()

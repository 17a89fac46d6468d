"""Draws benchmarks/results/transports_*.json: `python -m benchmarks.plot_transports`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
COLOURS = {
    "shm": "#5b7f95",
    "tcp": "#8a6d3b",
    "nixl": "#3f7d58",
    "cuda_ipc": "#b4521e",
    "host to GPU": "#5b7f95",
    "GPU to host": "#b4521e",
}
STYLES = ("--", "-")  # of the smaller and the larger page


def main() -> None:
    paths = sorted(RESULTS.glob("transports_*.json"))
    figure, axes = plt.subplots(1, len(paths), figsize=(5 * len(paths), 3.6), squeeze=False)
    for axis, path in zip(axes[0], paths, strict=True):
        draw(axis, json.loads(path.read_text())["rows"])
        axis.set_title(path.stem.removeprefix("transports_").replace("_", " "), fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / "transports.png", dpi=110)


def draw(axis, rows: list[dict]) -> None:
    """Rate against the bytes of one pull: pages of each size, and the plainest way dotted."""
    for transport in dict.fromkeys(row["transport"] for row in rows):
        sizes = sorted({row["page_mib"] for row in rows if row["transport"] == transport})
        for page_mib, style in zip(sizes, STYLES, strict=True):
            line = [row for row in rows if (row["transport"], row["page_mib"]) == (transport, page_mib)]
            pulled = [row["mib"] for row in line]
            label = f"{transport}, pages of {page_mib} MiB"
            axis.plot(pulled, [row["gb_per_s"] for row in line], style, color=COLOURS[transport], label=label)
        plain = next(name for name in line[0] if name.endswith("_gb_per_s"))
        rates = [row[plain] for row in line]
        axis.plot(pulled, rates, ":", color=COLOURS[transport], label=plain.removesuffix("_gb_per_s"))
    axis.set_xscale("log", base=2)
    axis.set_xlabel("MiB in one pull", fontsize=8)
    axis.set_ylabel("GB/s", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)


if __name__ == "__main__":
    main()

"""Plots of `benchmarks/attention_kernels.py`: `python -m benchmarks.plot_attention_kernels RESULT.json`."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "kernels"  # the same file from the same figures

NAMES = {
    "ours": "ours, paged",
    "ours_overlapped": "ours, over the previous kernel",
    "ours_batch_invariant": "ours, batch-invariant",
    "cudnn": "cuDNN",
    "fa3": "FlashAttention-3",
    "fa3_paged": "FlashAttention-3, paged",
}


def plot_prefill(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """TFLOP/s by sequence length, one panel a head_dim."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, d in zip(panels, (128, 64), strict=True):
        some = [row for row in rows if row["head_dim"] == d]
        for name in some[0]["tflops"]:
            panel.plot([str(r["seq"]) for r in some], [r["tflops"][name] for r in some], "o-", label=NAMES[name])
        panel.set(title=f"causal prefill, head_dim {d}", xlabel="tokens a sequence (16,384 in all)", ylim=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("TFLOP/s")
    panels[0].legend()
    figure.suptitle(device)
    figure.savefig(path, metadata={"Date": None})


def plot_decode(rows: list[dict[str, Any]], ceiling: float, device: str, path: Path) -> None:
    """GB/s of K and V for every batch and context."""
    figure, panel = plt.subplots(figsize=(10, 4), layout="constrained")
    names = list(rows[0]["gb_per_s"])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [x + i * width for x in range(len(rows))]
        panel.bar(at, [r["gb_per_s"][name] for r in rows], width, label=NAMES[name])
    labels = [f"{r['batch']} x\n{r['context'] // 1024}k" for r in rows]
    panel.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], labels)
    panel.axhline(ceiling, color="gray", linestyle="--", label="read ceiling")
    panel.set(title=f"paged decode, head_dim 128: {device}", ylabel="GB/s of K and V", xlabel="batch x context")
    panel.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write the two plots beside the results."""
    source = Path(sys.argv[1])
    results = json.loads(source.read_text())
    device = results["meta"]["device"].split(",")[0]
    plot_prefill(results["prefill"], device, source.with_name(source.stem + "_prefill.svg"))
    plot_decode(results["decode"], results["read_gb_per_s"], device, source.with_name(source.stem + "_decode.svg"))


if __name__ == "__main__":
    main()

"""Where a step's time goes on the GPU, kernel by kernel, out of the profiler's trace."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# The first line one of whose parts is in a kernel's name says what kind it is.
KINDS = {
    "sampling": ("draw_kernel", "edit_kernel", "histogram_kernel", "cut_kernel", "collect_kernel", "log_probs"),
    "attention": ("decode_", "merge_", "plan_kernel", "prefill"),
    "products": ("linear_kernel", "nvjet", "gemm", "gemv", "cutlass", "splitK"),
    "small kernels": ("",),
}
STEP_END = "_advance_rows"  # the last kernel of a decode step
Json = dict[str, Any]


class Span(NamedTuple):
    """One kernel or copy, in microseconds."""

    start: float
    end: float
    name: str


def trace(run: Callable[[], object]) -> list[Span]:
    """What the GPU did while `run` ran."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as traced:
        run()
        torch.cuda.synchronize()
    return sorted(
        Span(event.time_range.start, event.time_range.end, event.name)
        for event in traced.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


def steps_of(spans: Sequence[Span]) -> list[list[Span]]:
    """Whole decode steps, the part before the first one's beginning and behind the last one's end left out."""
    ends = [i for i, span in enumerate(spans) if STEP_END in span.name]
    return [list(spans[a + 1 : b + 1]) for a, b in pairwise(ends)]


def summary(steps: Sequence[Sequence[Span]]) -> Json:
    """Milliseconds of a step by kind and by kernel, the share in which nothing ran, and one step span by span.

    A kernel that starts while its predecessor still runs counts from that one's end, so the times add up.
    """
    begin, end = steps[0][0].start, steps[-1][-1].end
    by_kind, by_kernel = dict.fromkeys(KINDS, 0.0), {}
    reached = begin
    for span in (span for step in steps for span in step):
        ms = max(0.0, span.end - max(span.start, reached)) / 1e3 / len(steps)
        by_kind[kind(span.name)] += ms
        by_kernel[span.name[:60]] = by_kernel.get(span.name[:60], 0.0) + ms
        reached = max(reached, span.end)
    step_ms = (end - begin) / 1e3 / len(steps)
    longest = sorted(by_kernel.items(), key=lambda item: -item[1])[:12]
    return {
        "steps": len(steps),
        "step_ms": step_ms,
        "idle_share": 1 - sum(by_kind.values()) / step_ms,
        "by_kind_ms": by_kind,
        "by_kernel_ms": dict(longest),
        "one_step": columns(steps[len(steps) // 2]),
    }


def columns(step: Sequence[Span]) -> Json:
    """A step for a picture: starts and lengths in microseconds, and each span's place in KINDS."""
    order = list(KINDS)
    return {
        "start_us": [round(span.start - step[0].start, 1) for span in step],
        "length_us": [round(span.end - span.start, 1) for span in step],
        "kind": [order.index(kind(span.name)) for span in step],
    }


def kind(name: str) -> str:
    """Of KINDS."""
    return next(kind for kind, parts in KINDS.items() if any(part in name for part in parts))

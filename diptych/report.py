"""Where the time of a request went: the router's stats beside what the client saw."""

import statistics
import time
from collections.abc import Sequence

from rich.table import Table

from diptych.client import Chunk

# Rows that say nothing where one worker did both phases.
_OF_HAND_OVER = ("decode joined", "pages handed over", "pulls took", "  at prefill, at decode")


class Timeline:
    """When tokens reached the client. Begins when it is made."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._arrivals: list[tuple[float, int]] = []  # seconds since the beginning, tokens

    def note(self, chunk: Chunk) -> None:
        """A chunk has come."""
        if chunk.token_ids:
            self._arrivals.append((time.monotonic() - self._begun, len(chunk.token_ids)))

    @property
    def first_token_ms(self) -> float:
        """0 where no token came."""
        return self._arrivals[0][0] * 1e3 if self._arrivals else 0.0

    @property
    def token_gaps_ms(self) -> list[float]:
        """Inter-token times; tokens that came in one message share its time evenly."""
        gaps: list[float] = []
        for (before, _), (now, tokens) in zip(self._arrivals, self._arrivals[1:], strict=False):
            gaps += [(now - before) * 1e3 / tokens] * tokens
        return gaps


def report(answers: Sequence[tuple[str, Chunk, Timeline]]) -> Table:
    """One column for each answer: its title, last chunk and timeline."""
    table = Table("", *(title for title, _, _ in answers), box=None, show_header=any(title for title, _, _ in answers))
    columns = [_column(chunk, timeline) for _, chunk, timeline in answers]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    return table


def logprobs_table(chunks: Sequence[Chunk]) -> Table:
    """One row for each token of prompt and answer: its id, its log-probability, and the likeliest in its place."""
    table = Table("", "id", "log-probability", "likeliest", box=None)
    for title, found in (
        ("prompt", [one for chunk in chunks for one in chunk.prompt_logprobs]),
        ("answer", [one for chunk in chunks for one in chunk.logprobs]),
    ):
        for one in found:
            likeliest = zip(one.top_ids, one.top_logprobs, strict=True)
            others = "  ".join(f"{token} {logprob:.3f}" for token, logprob in likeliest)
            table.add_row(title, str(one.token_id), f"{one.logprob:.3f}", others)
    return table


def _column(last: Chunk, timeline: Timeline) -> dict[str, str]:
    usage, stats = last.usage, last.stats
    if usage is None or stats is None:
        raise ValueError("stats come with the last chunk")
    gaps = timeline.token_gaps_ms
    moved = f"{stats.bytes_handed_over / 2**20:.1f} MiB"
    hits = max(stats.prefill_prefix_pages, stats.decode_prefix_pages)
    column = {
        "prompt tokens": str(usage.prompt_tokens),
        "answer tokens": str(usage.completion_tokens),
        "queue": _ms(stats.queue_ms),
        "prefill": _ms(stats.prefill_ms),
        "first token, at the router": _ms(stats.first_token_ms),
        "first token, at the client": _ms(timeline.first_token_ms),
        "decode joined": _ms(stats.decode_joined_ms),
        "pages handed over": f"{stats.pages_handed_over} ({moved}, {stats.transport})",
        "pulls took": _ms(stats.hand_over_ms),
        "prefix pages hit": f"{hits} of {stats.prompt_pages}",
        "  at prefill, at decode": f"{stats.prefill_prefix_pages}, {stats.decode_prefix_pages}",
        "prefix pages fetched": f"{stats.prefill_fetched_pages} ({_ms(stats.fetch_ms)})",
        "between tokens, median": _ms(statistics.median(gaps)) if gaps else "-",
        "between tokens, worst": _ms(max(gaps)) if gaps else "-",
        "workers": f"{stats.prefill_worker}, {stats.decode_worker}",
    }
    if stats.prefill_worker == stats.decode_worker != "":
        column |= dict.fromkeys(_OF_HAND_OVER, "-") | {"workers": stats.prefill_worker}
    return column


def _ms(value: float) -> str:
    return f"{value:.1f} ms"

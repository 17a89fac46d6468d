"""What came of the requests, and what of it must not be."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from diptych.client import Chunk


class Tally:
    """Counts outcomes. An outcome is `answered`, `aborted` by its client, `late`, or an error's code and stage."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.transports: Counter[str] = Counter()
        self.reached: Counter[str] = Counter()  # paths that finished requests took
        self.tokens = 0
        self.placed_again = 0
        self.stuck: list[str] = []  # requests that took all of a long deadline
        self.wrong: list[dict[str, Any]] = []

    @property
    def requests(self) -> int:
        return self.outcomes.total()

    @property
    def untyped(self) -> int:
        """Errors that do not say what the caller can do."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("internal"))

    def check(self, clean: Sequence[int], got: Sequence[int], whole: bool, request_id: str) -> None:
        """What came must be the clean answer; where it broke off, the clean answer's beginning."""
        self.tokens += len(got)
        expected = tuple(clean) if whole else tuple(clean[: len(got)])
        if tuple(got) != expected:
            self.wrong.append({"request_id": request_id, "expected": list(clean), "got": list(got)})

    def note_answer(self, last: Chunk) -> None:
        stats = last.stats
        assert stats is not None  # the last chunk's
        self.outcomes["answered"] += 1
        self.placed_again += stats.prefill_attempts > 1
        if stats.transport:
            self.transports[stats.transport] += 1
        self.reached["colocated" if stats.prefill_worker == stats.decode_worker else "split"] += 1
        self.reached["prefix found by prefill"] += stats.prefill_prefix_pages > 0
        self.reached["prefix fetched from another holder"] += stats.prefill_fetched_pages > 0
        self.reached["prefix found by decode"] += stats.decode_prefix_pages > 0

"""A prompt that a worker computes."""

from dataclasses import dataclass, field
from time import monotonic

from engine.sequence import Sequence
from protos.v1 import worker_pb2
from worker.prefix_fetch import PrefixFetch


@dataclass
class PromptRequest:
    """Times are monotonic seconds."""

    router_id: str
    sequence: Sequence
    deadline: float
    order: worker_pb2.Fetch  # where more of its pages are than here; empty where nowhere
    received: float = field(default_factory=monotonic)
    started: float = 0.0
    fetch: PrefixFetch | None = None  # once it was begun
    named: int = 0  # pages that the router knows to be sealed, where another worker goes on

    @property
    def stage(self) -> str:
        """Which phase it is in."""
        return "prefill" if len(self.sequence.tokens) == self.sequence.prompt_len else "decode"

    def report(self) -> worker_pb2.PrefillReport:
        """What the first token's update says; the prompt has just been computed."""
        return worker_pb2.PrefillReport(
            queue_ms=(self.started - self.received) * 1e3,
            compute_ms=(monotonic() - self.started) * 1e3,
            prefix_pages=self.sequence.prefix_pages,
            fetched_pages=self.fetch.pages if self.fetch else 0,
            fetch_ms=self.fetch.ms if self.fetch else 0.0,
        )

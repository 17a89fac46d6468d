"""A prompt that a worker computes."""

from dataclasses import dataclass, field
from time import monotonic

from engine.sequence import Sequence
from protos.v1 import worker_pb2


@dataclass
class PromptRequest:
    """Times are monotonic seconds."""

    router_id: str
    sequence: Sequence
    deadline: float
    received: float = field(default_factory=monotonic)
    started: float = 0.0
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
        )

"""A sequence on its way from prefill to decode."""

from dataclasses import dataclass, field

from engine.sequence import Sequence
from protos.v1 import worker_pb2


@dataclass
class Arrival:
    """`sequence` has credit once it is admitted; its pages fill in order, and it joins when all have been verified."""

    router_id: str
    sequence: Sequence
    source: worker_pb2.PageSource
    deadline: float  # monotonic
    report: worker_pb2.HandOverReport = field(default_factory=worker_pb2.HandOverReport)
    named: list[worker_pb2.PageRef] = field(default_factory=list)  # by the router, and not yet asked for
    first_token: int | None = None
    in_flight: int = 0  # pulls that still write into its pages
    joined: bool = False  # the engine has its sequence, and does with its pages as it needs
    ended: bool = False  # its pages go when nothing writes into them any more

    @property
    def request_id(self) -> str:
        return self.sequence.request_id

    @property
    def admitted(self) -> bool:
        return self.sequence.credit is not None

    def prompt_pages(self, page_size: int) -> int:
        """Pages that the prompt fills, the last one perhaps in part."""
        return -(-self.sequence.prompt_len // page_size)

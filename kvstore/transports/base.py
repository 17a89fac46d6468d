"""The seam between the store and the ways that pages can move."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from kvstore.cuda import Event
from kvstore.pool import PageId
from kvstore.segment_base import SegmentBase
from protos import errors
from protos.v1 import worker_pb2

PageRef = tuple[int, int]  # page and generation in the owner's pool

STAGE = "hand_over"


class PageServer(ABC):
    """Lets readers reach this worker's segment. `endpoint` is what they need to know.

    A page may be named to readers only once its bytes are there. On a GPU that is when the kernels that wrote them have
    ended, as the host has seen by an event: nothing orders a reader after kernels that are still queued here.
    """

    endpoint: worker_pb2.Endpoint

    @abstractmethod
    def close(self) -> None:
        """Stop serving. May be called again."""


class PageReader(ABC):
    """Pulls pages of one life of one worker into the local segment. Blocking: all calls from one puller's thread."""

    name: str
    passed_over = ""  # better transports that did not work, each with its reason

    def __init__(self, segment: SegmentBase) -> None:
        self._segment = segment

    def pull(
        self, refs: Sequence[PageRef], into: Sequence[PageId], timeout_s: float, after: Event | None = None
    ) -> int:
        """Copy the pages `refs` name into the local pages `into`; returns the bytes copied.

        On a GPU a local page may still be written by steps that were launched before it was last freed: nothing is
        copied until `after`, an event recorded behind them, has happened. In host memory nothing is queued.

        Generations are compared after the copy. Only when this returns may the local pages be made visible; they are
        then there for every stream.

        Raises `StalePage` where a page is no longer the one that its reference names, and `WorkerLost` where the
        owner is gone, is another life, or has not delivered within `timeout_s`; the reader is closed after that.
        """
        if len(refs) != len(into):
            raise ValueError(f"{len(refs)} pages cannot go into {len(into)}")
        for page in into:
            if not 0 <= page < self._segment.num_pages:
                raise ValueError(f"page {page} is not in the local segment")
        try:
            found = self._copy(refs, into, timeout_s, after)
        except errors.WorkerLost:
            self.close()
            raise
        check_generations(refs, found)
        return len(refs) * self._segment.format.page_bytes

    def owner_gone(self) -> bool:
        """Whether the owner is known to be gone. Its memory is given back only when every reader has closed."""
        return False

    @abstractmethod
    def _copy(
        self, refs: Sequence[PageRef], into: Sequence[PageId], timeout_s: float, after: Event | None
    ) -> Sequence[int]:
        """Copy, and *then* read and return the generations of the pages that `refs` name.

        Raises `StalePage` for a page that the owner's pool does not have, and `WorkerLost`.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the owner's memory or connection; a pull is then `WorkerLost`. May be called again."""


def check_generations(refs: Iterable[PageRef], found: Iterable[int]) -> None:
    """The fence: a page whose generation has changed was freed, so its copy may be of anything. `StalePage`."""
    for (page, wanted), generation in zip(refs, found, strict=True):
        if generation != wanted:
            raise errors.StalePage(
                f"page {page} has generation {generation}, not {wanted}: it was freed meanwhile", stage=STAGE
            )

"""Pages where a socket can reach them: a pool in host memory itself, or a pinned buffer beside a GPU's."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from kvstore.cuda import CopyStream, Event, PinnedMemory
from kvstore.device_segment import DeviceSegment
from kvstore.segment import Segment
from kvstore.segment_base import SegmentBase

_STAGED_BYTES = 8 << 20


class HostWindow(ABC):
    """At most `most` pages at a time. What `read` and `room` return is good until the next call of either."""

    most: int

    @abstractmethod
    def read(self, pages: Sequence[int]) -> list[memoryview]:
        """The bytes of these pages."""

    @abstractmethod
    def room(self, pages: Sequence[int]) -> list[memoryview]:
        """Where the bytes for these pages are to be put; then comes `put`."""

    @abstractmethod
    def put(self, pages: Sequence[int], after: Event | None) -> None:
        """What is in the room is the pages' now. They are written when `after` has happened."""


class DirectWindow(HostWindow):
    """A pool in host memory: nothing is copied."""

    most = 4096

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def read(self, pages: Sequence[int]) -> list[memoryview]:
        return [self._segment.pages[page].data for page in pages]

    def room(self, pages: Sequence[int]) -> list[memoryview]:
        return self.read(pages)

    def put(self, pages: Sequence[int], after: Event | None) -> None:
        """They are there already."""


class StagedWindow(HostWindow):
    """A pool on a GPU: pages pass through pinned memory, at several times the rate of the network."""

    def __init__(self, segment: DeviceSegment) -> None:
        self._size = segment.format.page_bytes
        self._base = segment.pages.pointer
        self.most = max(1, _STAGED_BYTES // self._size)
        self._pinned = PinnedMemory(self.most * self._size, segment.device)
        self._stream = CopyStream(segment.device)

    def read(self, pages: Sequence[int]) -> list[memoryview]:
        self._stream.copy(self._on_gpu(pages), self._staged(pages), self._size)
        return self.room(pages)

    def room(self, pages: Sequence[int]) -> list[memoryview]:
        return [self._pinned.bytes[i * self._size : (i + 1) * self._size] for i in range(len(pages))]

    def put(self, pages: Sequence[int], after: Event | None) -> None:
        self._stream.copy(self._staged(pages), self._on_gpu(pages), self._size, after)

    def _on_gpu(self, pages: Sequence[int]) -> list[int]:
        return [self._base + page * self._size for page in pages]

    def _staged(self, pages: Sequence[int]) -> list[int]:
        return [self._pinned.pointer + i * self._size for i in range(len(pages))]


def open_window(segment: SegmentBase) -> HostWindow:
    """The one that suits the pool. Used by one thread at a time."""
    if isinstance(segment, DeviceSegment):
        return StagedWindow(segment)
    assert isinstance(segment, Segment)
    return DirectWindow(segment)

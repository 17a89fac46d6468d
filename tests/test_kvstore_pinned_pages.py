"""Which memory is pinned, and when. tests/gpu/test_host_tier.py has the rest."""

from collections.abc import Iterator

import numpy as np
import pytest

from kvstore import pinned_pages
from kvstore.cuda import CudaError
from kvstore.pinned_pages import PinnedPages
from kvstore.segment import Segment
from kvstore_owner import SMALL


class FakeRange:
    """Notes what is pinned instead of pinning it."""

    pinned: list[tuple[int, int, bool]] = []

    def __init__(self, pointer: int, size: int, device: int, read_only: bool) -> None:
        if any(pointer < at + length and at < pointer + size for at, length, _ in self.pinned):
            raise CudaError("it is pinned already")
        self.range = (pointer, size, read_only)
        self.pinned.append(self.range)

    def close(self) -> None:
        self.pinned.remove(self.range)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, bool]]]:
    monkeypatch.setattr(pinned_pages, "PinnedRange", FakeRange)
    monkeypatch.setattr(pinned_pages, "_PIECE_BYTES", 4 * SMALL.page_bytes)
    yield FakeRange.pinned
    assert not FakeRange.pinned


def test_pieces_are_pinned_once_when_a_page_of_them_is_wanted(pinned):
    segment = Segment.create(SMALL, 10, incarnation=1)
    base, size = segment.pages.ctypes.data, SMALL.page_bytes
    assert segment.addresses([9, 1, 0], device=0) == [base + 9 * size, base + size, base]
    assert pinned == [(base, 4 * size, False), (base + 8 * size, 2 * size, False)]
    segment.addresses([3, 8], device=0)
    assert len(pinned) == 2
    segment.addresses([4], device=0)
    assert len(pinned) == 3
    segment.close()
    segment.close()
    assert not pinned
    with pytest.raises(ValueError, match="closed"):
        segment.addresses([0], device=0)


def test_what_is_mapped_for_reading_is_pinned_for_reading(pinned):
    segment = Segment.create(SMALL, 2, incarnation=1)
    theirs = Segment.open(segment.address, 1, SMALL)
    theirs.addresses([1], device=0)
    assert [read_only for _, _, read_only in pinned] == [True]
    theirs.close()
    segment.close()


@pytest.mark.parametrize("page_bytes", [24, 3 << 10, 4096, 20 << 10, 3 << 20])
def test_no_two_pieces_share_a_page_of_the_system(pinned, page_bytes):
    memory = np.zeros((50, page_bytes), np.uint8)
    pages = PinnedPages(memory)
    addresses = pages.addresses(range(50), device=0)
    assert addresses == [memory.ctypes.data + page * page_bytes for page in range(50)]
    assert sum(size for _, size, _ in pinned) == memory.nbytes
    assert all(size % 4096 == 0 for _, size, _ in pinned[:-1])
    pages.close()


def test_what_could_not_be_pinned_is_tried_again(pinned, monkeypatch):
    pages = PinnedPages(np.zeros((8, SMALL.page_bytes), np.uint8))

    def fail(*_: object, **__: object) -> None:
        raise CudaError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(pinned_pages, "PinnedRange", fail)
        with pytest.raises(CudaError):
            pages.addresses([0], device=0)
    pages.addresses([0, 7], device=0)
    assert len(pinned) == 2
    pages.close()

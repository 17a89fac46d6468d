"""Pages through NIXL, whose UCX takes RDMA where there is some, and TCP or shared memory where there is none.

The reader reads the owner's memory; the owner's own threads do nothing where the network card can do it. Where UCX
has only TCP, the owner's NIXL answers, and one thing can go wrong that is not ours: an owner that was stopped in the
middle of a pull and goes on after the reader has given up is ended by UCX.
"""

import time
from collections.abc import Sequence

import numpy as np

from kvstore import cuda
from kvstore.device_segment import DeviceSegment
from kvstore.pool import PageId
from kvstore.segment import Segment
from kvstore.segment_base import SegmentBase
from kvstore.segment_header import GENERATIONS_AT, INCARNATION_AT, SegmentHeader, incarnation_in
from kvstore.transports import nixl_agent
from kvstore.transports.base import STAGE, PageReader, PageRef, PageServer
from kvstore.transports.nixl_address import NixlAddress
from kvstore.transports.nixl_agent import Blocks, NixlAgent
from protos import errors
from protos.v1 import worker_pb2

NAME = "nixl"
_CONNECT_S = 10.0
_WORD = 8  # bytes: header and generations are read in words
_HEADER = range(GENERATIONS_AT // _WORD)
_INCARNATION = INCARNATION_AT // _WORD


def unavailable(segment: SegmentBase) -> str:
    """Why pages cannot be read out of a pool, or come into one, so; empty where they can."""
    return nixl_agent.unavailable()


class NixlServer(PageServer):
    """Lets readers read the whole segment. No thread of ours runs. `FixTheSetup` where NIXL does not start."""

    def __init__(self, segment: SegmentBase, host: str) -> None:
        header, pages = segment.generations.ctypes.data - GENERATIONS_AT, _pages(segment)
        try:
            self._agent = NixlAgent()
            self._agent.register(header, segment.header.size)
            if pages.device is not None:
                self._agent.register(pages.address, pages.size * pages.count, pages.device)
            address = NixlAddress(header, pages.address, pages.count, pages.device, self._agent.metadata())
        except errors.WorkerLost as error:
            raise errors.FixTheSetup(f"{error.message}: leave nixl out of transports", stage="start") from error
        self.endpoint = worker_pb2.Endpoint(transport=NAME, address=address.pack())

    def close(self) -> None:
        self._agent.close()


class NixlReader(PageReader):
    """Reads an owner's pages, and then their generations, into memory of an agent of its own.

    Raises `WorkerLost` where nobody answers, or another life does, and `FormatMismatch`.
    """

    name = NAME

    def __init__(self, address: str, incarnation: int, segment: SegmentBase) -> None:
        super().__init__(segment)
        where = NixlAddress.unpack(address)
        self._incarnation = incarnation
        self._num_pages = where.num_pages
        self._words = np.zeros(len(_HEADER) + where.num_pages, np.uint64)  # the owner's header and generations
        self._agent = NixlAgent()
        try:
            self._connect(where)
        except errors.DiptychError:
            self.close()
            raise

    def _connect(self, where: NixlAddress) -> None:
        owner = self._agent.meet(where.metadata)
        here = self._words.ctypes.data
        self._agent.register(here, self._words.nbytes)
        self._words_here = self._agent.prepare(Blocks(here, _WORD, self._words.size))
        self._words_there = self._agent.prepare(Blocks(where.header, _WORD, self._words.size), owner)
        self._read_words(_HEADER, time.monotonic() + _CONNECT_S)
        header = SegmentHeader.unpack(self._words.data, self._incarnation, self._segment.format)
        if header.num_pages != where.num_pages:
            raise errors.WorkerLost("the owner's pool has another size", stage=STAGE)
        pages = _pages(self._segment)
        self._agent.register(pages.address, pages.size * pages.count, pages.device)
        self._pages_here = self._agent.prepare(pages)
        self._pages_there = self._agent.prepare(Blocks(where.pages, pages.size, where.num_pages, where.device), owner)

    def _copy(
        self, refs: Sequence[PageRef], into: Sequence[PageId], timeout_s: float, after: cuda.Event | None
    ) -> list[int]:
        if timeout_s <= 0:
            raise errors.WorkerLost(f"{len(refs)} pages were not copied in {timeout_s} s", stage=STAGE)
        deadline = time.monotonic() + timeout_s
        pages = [PageId(page) for page, _ in refs]
        if pages and max(pages) >= self._num_pages:
            raise errors.StalePage(f"the owner's pool has no page {max(pages)}", stage=STAGE)
        if after is not None:
            cuda.wait(after)
        if pages:
            self._read_pages(pages, into, deadline)
        words = [len(_HEADER) + page for page in pages]
        self._read_words([_INCARNATION, *words], deadline)
        if incarnation_in(self._words.data) != self._incarnation:
            raise errors.WorkerLost("the owner is another life by now, or closed its pool", stage=STAGE)
        found: list[int] = self._words[words].tolist()
        return found

    def _read_pages(self, pages: Sequence[PageId], into: Sequence[PageId], deadline: float) -> None:
        self._agent.read(self._pages_here, into, self._pages_there, pages, deadline)

    def _read_words(self, words: Sequence[int], deadline: float) -> None:
        self._agent.read(self._words_here, words, self._words_there, words, deadline)

    def close(self) -> None:
        self._agent.close()


def _pages(segment: SegmentBase) -> Blocks:
    size = segment.format.page_bytes
    if isinstance(segment, DeviceSegment):
        return Blocks(segment.pages.pointer, size, segment.num_pages, segment.device)
    assert isinstance(segment, Segment)
    return Blocks(segment.pages.ctypes.data, size, segment.num_pages)

"""A worker's pages in anonymous shared memory, which other processes of the host can open to read."""

import fcntl
import mmap
import os
import re
import select
import stat
import struct

import numpy as np
from numpy.typing import NDArray

from kvstore.page_format import PageFormat
from protos import errors

# magic, version, incarnation, num_pages, page_bytes, layers, kv_heads, page_size, head_dim, dtype
_HEADER = struct.Struct("<8sQQQQIIII16s")
_MAGIC = b"diptychS"
_VERSION = 1
_GENERATIONS_AT = 128
_PAGE_ALIGNMENT = 4096  # a multiple of the cache line (64) and of what direct I/O wants
_ADDRESS = re.compile(r"/proc/([0-9]+)/fd/[0-9]+")
# Sealed against changes of its size: a mapping of it cannot end in SIGBUS.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
STAGE = "segment"


class Segment:
    """`header | int64 generations | pages`: a memfd, so that nothing stays behind when its owner is killed.

    The owner makes one with `create`. Another process of the host maps it with `open`, for reading only.
    """

    def __init__(
        self, page_format: PageFormat, num_pages: int, incarnation: int, memory: mmap.mmap, address: str
    ) -> None:
        self.format = page_format
        self.num_pages = num_pages
        self.incarnation = incarnation
        self.address = address  # /proc/<pid>/fd/<fd>
        self._memory: mmap.mmap | None = memory
        self._fds: list[int] = []  # owner: the memory; reader: the owner's process
        self._generations: NDArray[np.int64] | None = np.frombuffer(memory, np.int64, num_pages, _GENERATIONS_AT)
        self._pages: NDArray[np.uint8] | None = np.frombuffer(
            memory, np.uint8, num_pages * page_format.page_bytes, _pages_at(num_pages)
        ).reshape(num_pages, page_format.page_bytes)

    @classmethod
    def create(cls, format: PageFormat, num_pages: int, incarnation: int) -> "Segment":  # noqa: A002
        """A new segment of zeros. Memory is taken as pages are first written."""
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, not {num_pages}")
        fd = os.memfd_create("diptych-pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _size(format, num_pages))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(fd, 0)
        except BaseException:
            os.close(fd)
            raise
        memory[: _HEADER.size] = _header(format, num_pages, incarnation)
        segment = cls(format, num_pages, incarnation, memory, f"/proc/{os.getpid()}/fd/{fd}")
        segment._fds.append(fd)
        return segment

    @classmethod
    def open(cls, address: str, incarnation: int, format: PageFormat) -> "Segment":  # noqa: A002
        """Map another process's segment, read-only.

        Raises `WorkerLost` where that life of the worker cannot be reached through `address`, and
        `FormatMismatch` where its pages have another format.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise errors.WorkerLost(f"{address!r} is no address of a segment", stage=STAGE)
        fds: list[int] = []
        try:
            # The process first: once its memory proves to be the right one, this is known to be its owner.
            fds.append(os.pidfd_open(int(match[1])))
            # Not blocking: should the number name a pipe by now, opening it would wait for the other end.
            fds.append(os.open(address, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            memory = _map(fds[1], address)
            theirs, num_pages = _check_header(memory, address, incarnation, format)
        except OSError as error:
            _close_all(fds)
            raise errors.WorkerLost(f"{address} cannot be opened: {error.strerror}", stage=STAGE) from error
        except errors.DiptychError:
            _close_all(fds)
            raise
        os.close(fds.pop())  # the mapping keeps the memory
        segment = cls(theirs, num_pages, incarnation, memory, address)
        segment._fds = fds
        return segment

    @property
    def generations(self) -> NDArray[np.int64]:
        """[num_pages], raised by the owner on each return of a page to FREE."""
        if self._generations is None:
            raise ValueError("the segment is closed")
        return self._generations

    @property
    def pages(self) -> NDArray[np.uint8]:
        """[num_pages, page_bytes]"""
        if self._pages is None:
            raise ValueError("the segment is closed")
        return self._pages

    def owner_alive(self) -> bool:
        """For a segment that was opened: whether the process that made it still runs."""
        if not self._fds:
            return False
        poll = select.poll()
        poll.register(self._fds[0], select.POLLIN)  # a pidfd becomes readable when its process ends
        return not poll.poll(0)

    def close(self) -> None:
        """Let go of the memory; arrays made from it keep it mapped while they live. May be called again."""
        self._generations = self._pages = self._memory = None  # unmaps with the last array, not under it
        _close_all(self._fds)
        self._fds = []


def _pages_at(num_pages: int) -> int:
    end = _GENERATIONS_AT + 8 * num_pages
    return -(-end // _PAGE_ALIGNMENT) * _PAGE_ALIGNMENT


def _size(page_format: PageFormat, num_pages: int) -> int:
    return _pages_at(num_pages) + num_pages * page_format.page_bytes


def _header(page_format: PageFormat, num_pages: int, incarnation: int) -> bytes:
    shape = (page_format.layers, page_format.kv_heads, page_format.page_size, page_format.head_dim)
    dtype = page_format.dtype.encode()
    return _HEADER.pack(_MAGIC, _VERSION, incarnation, num_pages, page_format.page_bytes, *shape, dtype)


def _map(fd: int, address: str) -> mmap.mmap:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_size < _HEADER.size:
        raise errors.WorkerLost(f"{address} is no segment any more", stage=STAGE)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # a file of the disk has none
        seals = 0
    if not seals & fcntl.F_SEAL_SHRINK:
        raise errors.WorkerLost(f"{address} is no segment any more", stage=STAGE)
    return mmap.mmap(fd, 0, prot=mmap.PROT_READ)


def _check_header(memory: mmap.mmap, address: str, incarnation: int, page_format: PageFormat) -> tuple[PageFormat, int]:
    magic, version, theirs, num_pages, _, layers, kv_heads, page_size, head_dim, dtype = _HEADER.unpack_from(memory)
    if magic != _MAGIC or theirs != incarnation:
        raise errors.WorkerLost(f"{address} belongs to another life of a worker", stage=STAGE)
    if version != _VERSION:
        raise errors.FormatMismatch(f"segment version {_VERSION} against {version}", stage=STAGE)
    peer = PageFormat(layers, kv_heads, page_size, head_dim, dtype.rstrip(b"\0").decode())
    if difference := page_format.difference(peer):
        raise errors.FormatMismatch(f"page formats differ: {difference}", stage=STAGE)
    if len(memory) < _size(peer, num_pages):
        raise errors.WorkerLost(f"{address} is cut short", stage=STAGE)
    return peer, num_pages


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)

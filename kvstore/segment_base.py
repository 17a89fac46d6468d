"""The part of a segment that is always in host memory: its header and the generations of its pages."""

import fcntl
import mmap
import os
import re
import select
import stat
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvstore.page_format import PageFormat
from kvstore.segment_header import STAGE, SegmentHeader, clear_incarnation, incarnation_in
from protos import errors

_ADDRESS = re.compile(r"/proc/([0-9]{1,10})/fd/[0-9]{1,10}")
# Sealed against changes of its size: a mapping of it cannot end in SIGBUS.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_LEAST = 4096  # bytes; no segment is smaller


class SegmentBase:
    """`header | int64 generations | ...` in a memfd, so that nothing stays behind when its owner is killed.

    The owner makes it. Another process of the host maps it with `open`, for reading only; the kernel lets in only
    who could debug the owner, so no stranger can. Subclasses add the pages.
    """

    def __init__(self, header: SegmentHeader, memory: mmap.mmap, address: str, fd: int, owner: bool) -> None:
        """`fd` is the memory for its owner, and a pidfd of the owner's process for a reader."""
        self.header = header
        self.format = header.format
        self.num_pages = header.num_pages
        self.incarnation = header.incarnation
        self.address = address  # /proc/<pid>/fd/<fd>
        self._memory: mmap.mmap | None = memory
        self._fd = fd
        self._is_owner = owner
        self._generations: NDArray[np.int64] | None = np.frombuffer(
            memory, np.int64, header.num_pages, header.generations_at
        )

    @classmethod
    def _create(cls, header: SegmentHeader) -> Self:
        """A new segment of zeros. Memory is taken as pages are first written."""
        fd = os.memfd_create("diptych-pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, header.size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(fd, 0)
        except BaseException:
            os.close(fd)
            raise
        packed = header.pack()
        memory[: len(packed)] = packed
        return cls(header, memory, f"/proc/{os.getpid()}/fd/{fd}", fd, owner=True)

    @classmethod
    def open(cls, address: str, incarnation: int, format: PageFormat) -> Self:  # noqa: A002
        """Map another process's segment, read-only.

        Raises `WorkerLost` where that life of the worker cannot be reached through `address`, and
        `FormatMismatch` where its pages have another format.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise errors.WorkerLost(f"{address!r} is no address of a segment", stage=STAGE)
        pidfd = -1
        try:
            # The process first: once its memory proves to be the right one, this is known to be its owner.
            pidfd = os.pidfd_open(int(match[1]))
            memory = _map(address)
            header = SegmentHeader.unpack(memory, incarnation, format)
            if len(memory) < header.size:
                raise errors.WorkerLost(f"{address} is cut short", stage=STAGE)
            return cls(header, memory, address, pidfd, owner=False)
        except (OSError, OverflowError, errors.DiptychError) as error:
            if pidfd >= 0:
                os.close(pidfd)
            if isinstance(error, errors.DiptychError):
                raise
            raise errors.WorkerLost(f"{address} cannot be opened: {error}", stage=STAGE) from error

    @property
    def generations(self) -> NDArray[np.int64]:
        """[num_pages], raised by the owner on each return of a page to FREE."""
        if self._generations is None:
            raise ValueError("the segment is closed")
        return self._generations

    def owner_alive(self) -> bool:
        """For a segment that was opened: whether the process that made it still runs, and has not closed it."""
        if self._memory is None or incarnation_in(self._memory) != self.incarnation:
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)  # a pidfd becomes readable when its process ends
        return not poll.poll(0)

    def close(self) -> None:
        """Let go of the memory; arrays made from it keep it mapped while they live. May be called again."""
        if self._memory is None:
            return
        if self._is_owner:
            clear_incarnation(self._memory)
        self._generations = self._memory = None  # unmaps with the last array, not under it
        os.close(self._fd)


def _map(address: str) -> mmap.mmap:
    # Not blocking: should the number name a pipe by now, opening it would wait for the other end.
    fd = os.open(address, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size < _LEAST or not _seals(fd) & fcntl.F_SEAL_SHRINK:
            raise errors.WorkerLost(f"{address} is no segment any more", stage=STAGE)
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)  # the mapping keeps the memory


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # a file of the disk has none
        return 0

"""What stands at the front of a segment's shared memory: all that a reader needs to know, in 256 bytes at most."""

import mmap
import struct
from dataclasses import dataclass
from typing import Self

from kvstore.page_format import PageFormat
from protos import errors

# magic, version, incarnation, num_pages, page_bytes, layers, kv_heads, page_size, head_dim, dtype, IPC handle, GPU
_LAYOUT = struct.Struct("<8sQQQQIIII16s64s16s")
_MAGIC = b"diptychS"
_VERSION = 3
_INCARNATION = struct.Struct("<Q")
INCARNATION_AT = 16
GENERATIONS_AT = 256
_PAGE_ALIGNMENT = 4096  # a multiple of the cache line (64) and of what direct I/O wants
_NO_HANDLE = bytes(64)
STAGE = "segment"


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """`ipc_handle` is CUDA's name for the pages' memory (64 bytes), or empty where the pages follow in host memory.

    `gpu` is the UUID of the GPU that they are on.
    """

    format: PageFormat
    num_pages: int
    incarnation: int
    ipc_handle: bytes = b""
    gpu: bytes = bytes(16)

    def __post_init__(self) -> None:
        if self.num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, not {self.num_pages}")

    @property
    def on_gpu(self) -> bool:
        return bool(self.ipc_handle)

    @property
    def generations_at(self) -> int:
        """Offset of `int64 generations[num_pages]`, in bytes."""
        return GENERATIONS_AT

    @property
    def pages_at(self) -> int:
        """Offset of the pages, where they are in host memory; else the end."""
        end = GENERATIONS_AT + 8 * self.num_pages
        return -(-end // _PAGE_ALIGNMENT) * _PAGE_ALIGNMENT

    @property
    def size(self) -> int:
        """Bytes of shared memory."""
        return self.pages_at + (0 if self.on_gpu else self.num_pages * self.format.page_bytes)

    def pack(self) -> bytes:
        shape = (self.format.layers, self.format.kv_heads, self.format.page_size, self.format.head_dim)
        sizes = (self.incarnation, self.num_pages, self.format.page_bytes)
        return _LAYOUT.pack(_MAGIC, _VERSION, *sizes, *shape, self.format.dtype.encode(), self.ipc_handle, self.gpu)

    @classmethod
    def unpack(cls, memory: mmap.mmap | memoryview, incarnation: int, page_format: PageFormat) -> Self:
        """Read and check another process's header.

        Raises `WorkerLost` where it is not of that life of the worker, and `FormatMismatch`.
        """
        magic, version, theirs, num_pages, _, layers, kv_heads, page_size, head_dim, dtype, ipc_handle, gpu = (
            _LAYOUT.unpack_from(memory)
        )
        if magic != _MAGIC or theirs != incarnation:
            raise errors.WorkerLost("the segment belongs to another life of a worker", stage=STAGE)
        if version != _VERSION:
            raise errors.FormatMismatch(f"segment version {_VERSION} against {version}", stage=STAGE)
        try:
            peer = PageFormat(layers, kv_heads, page_size, head_dim, dtype.rstrip(b"\0").decode())
            header = cls(peer, num_pages, incarnation, b"" if ipc_handle == _NO_HANDLE else ipc_handle, gpu)
        except ValueError as error:
            raise errors.FormatMismatch(f"the segment's header is not valid: {error}", stage=STAGE) from error
        if difference := page_format.difference(peer):
            raise errors.FormatMismatch(f"page formats differ: {difference}", stage=STAGE)
        return header


def incarnation_in(memory: mmap.mmap | memoryview) -> int:
    """Whose header this is now."""
    incarnation: int = _INCARNATION.unpack_from(memory, INCARNATION_AT)[0]
    return incarnation


def clear_incarnation(memory: mmap.mmap) -> None:
    """Nobody's from now on: readers take the owner for gone."""
    _INCARNATION.pack_into(memory, INCARNATION_AT, 0)

"""Checksums of this worker's pages, and the comparison after a copy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.page_checksum import page_checksum
from kvstore.transports.base import STAGE
from protos.errors import CorruptPage
from protos.v1 import worker_pb2


class PageChecksums:
    """Made where the pool is, and from any thread; what is asked for must have arrived there.

    On a GPU it happens beside the engine's steps, on a stream of its own, and the caller waits for it.
    """

    def __init__(self, cache: Tensor) -> None:
        """cache [pages, ...]"""
        self._cache = cache
        self._stream = torch.cuda.Stream(cache.device) if cache.is_cuda else None  # type: ignore[no-untyped-call]

    def of(self, pages: Sequence[int]) -> list[int]:
        """One for each page: unsigned, 64 bits, never 0."""
        with torch.cuda.stream(self._stream):  # without one nothing changes
            sums: list[int] = page_checksum(self._cache, torch.tensor(pages, device=self._cache.device)).tolist()
        return [value % 2**64 or 1 for value in sums]

    def name(self, refs: Sequence[worker_pb2.PageRef]) -> None:
        """Put into each reference its page's checksum. One that was freed has any, and its pull fails the fence."""
        for ref, found in zip(refs, self.of([ref.page for ref in refs]), strict=True):
            ref.checksum = found

    def compare(self, refs: Sequence[worker_pb2.PageRef], copies: Sequence[int]) -> None:
        """Raise `CorruptPage` where a copy is not what its owner has named. Owners that make no checksum name 0."""
        for ref, found in zip(refs, self.of(copies), strict=True):
            if ref.checksum not in (0, found):
                raise CorruptPage(
                    f"the copy of page {ref.page} has the checksum {found:016x}, not {ref.checksum:016x}", stage=STAGE
                )

"""What the attention of a CUDA graph's prefill step needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GROUPS = 2  # of 64 query rows in a tile
Array = npt.NDArray[Any]


class PrefillPlan:
    """Chunks whose lengths and pages are read on the device: captured once, right at every replay.

    page_table [chunks, columns] int32; records [programs, rounds, 8] and counts [programs] int32 as in `PrefillTiles`:
    what they must hold for given chunks, `tiles` says. For Hopper GPUs, the shapes of `capability.has_hopper_prefill`
    and layers without a window. Page numbers are not checked.
    """

    def __init__(self, page_table: Tensor, records: Tensor, counts: Tensor, page_size: int) -> None:
        self.page_table = page_table
        self.records = records
        self.counts = counts
        self.page_size = page_size

    def tiles(
        self, queries: Sequence[int], contexts: Sequence[int], heads: int, kv_heads: int, head_dim: int
    ) -> tuple[Array, Array] | None:
        """(records, counts) for chunks of so many queries and tokens; None where there is no room for them."""
        from kernels.hopper_prefill import keys_for
        from kernels.hopper_tiles import GROUP_ROWS, deal, make_tiles

        rows, keys = _GROUPS * GROUP_ROWS, keys_for(head_dim)
        made = make_tiles(list(queries), list(contexts), self.page_size, heads, rows, keys)
        dealt, dealt_counts = deal(made, heads // kv_heads, self.records.shape[0])
        if dealt.shape[1] > self.records.shape[1]:
            return None
        dealt[:, :, 4] = dealt[:, :, 4] * self.page_table.stride(0) + dealt[:, :, 6]
        dealt[:, :, 6] = 0
        records, counts = np.zeros(self.records.shape, np.int32), np.zeros(self.counts.shape, np.int32)
        records[: dealt.shape[0], : dealt.shape[1]], counts[: len(dealt_counts)] = dealt, dealt_counts
        return records, counts

    def attend(self, q: Tensor, cache: Tensor, layer: int) -> Tensor:
        """q [tokens, heads, d] -> [tokens, heads, d], as `paged_attention`; what no chunk has gets anything."""
        from kernels.hopper_prefill import keys_for, prefill_arguments
        from kernels.hopper_prefill_kernel import prefill_kernel
        from kernels.hopper_tiles import PrefillTiles

        tiles = PrefillTiles(self.records, self.counts, _GROUPS, keys_for(q.shape[2]))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        arguments, constants = prefill_arguments(q, cache, layer, self.page_table, tiles, out, None, 0, 0.0)
        prefill_kernel[(self.records.shape[0],)](*arguments, **constants)
        return out

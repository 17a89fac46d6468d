"""What the attention of a CUDA graph's decode step needs to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from kernels.hopper_decode_schedule import DecodeSchedule


class DecodePlan:
    """Rows of one query each whose lengths are read on the device: captured once, right at every replay.

    page_table   [rows, columns] int32
    context_lens [rows] int32: tokens to attend to; 0 marks a row without a sequence

    For Hopper GPUs and the shapes of `capability.has_hopper_decode`. Page numbers are not checked.
    """

    def __init__(self, page_table: Tensor, context_lens: Tensor) -> None:
        self.page_table = page_table
        self.context_lens = context_lens
        self._schedules: dict[tuple[int, ...], DecodeSchedule] = {}

    def refresh(self) -> None:
        """Share the work out anew by the lengths that the device holds now: the head of each step."""
        for schedule in self._schedules.values():
            schedule.refresh()

    def attend(self, q: Tensor, cache: Tensor, layer: int, window: int = 0, soft_cap: float = 0.0) -> Tensor:
        """q [rows, heads, d] -> [rows, heads, d], as `paged_attention`. The first call must not be in a capture.

        The previous kernel of the stream may only have written pages, and those at the rows' newest tokens: attention
        starts while it runs.
        """
        from kernels.hopper_decode import decode_pages

        schedule = self._schedule(q.shape[1], cache.shape[3], q.shape[2], window)
        return decode_pages(q, cache, layer, self.page_table, schedule, overlap_previous=True, soft_cap=soft_cap)

    def _schedule(self, heads: int, kv_heads: int, head_dim: int, window: int) -> DecodeSchedule:
        from kernels.hopper_decode import DecodeSchedule

        key = (heads, kv_heads, head_dim, window)
        if key not in self._schedules:
            self._schedules[key] = DecodeSchedule(self.context_lens, heads, kv_heads, head_dim, window=window)
        return self._schedules[key]

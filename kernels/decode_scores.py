"""The CPU's decode attention: where scores lie, and how K and V are read by row numbers."""

import warnings
from functools import cache as run_once

import torch
from torch import Tensor

from kernels.attention_plan import AttentionPlan


class DecodeScores:
    """Where the step's scores lie: ragged [tokens, heads, keys seen], as the values of one sparse matrix.

    Its columns are rows of the pool seen as [rows, d], counted from the layer's first, so that one set of numbers
    serves K and V of every layer.
    """

    def __init__(self, plan: AttentionPlan, cache: Tensor, heads: int, window: int) -> None:
        _, layers, _, kv_heads, page_size, _ = cache.shape
        pages = plan.pages()[: plan.num_decodes]
        pool_pages = cache.shape[0]
        self._widened = None
        if cache.dtype != torch.float32:
            self._widened = _Widened(torch.cat(pages), cache)
            pages = list(torch.split(torch.arange(len(self._widened.pages)), [len(p) for p in pages]))
            pool_pages, layers = len(self._widened.pages), 1
        self._half = kv_heads * page_size  # rows from a layer's K to its V
        head_rows = torch.arange(0, self._half, page_size).view(kv_heads, 1, 1)
        tile = head_rows + torch.arange(page_size)  # [kv_heads, 1, page_size]
        group = heads // kv_heads
        rows, keys = [], []
        for p, context in zip(pages, plan.contexts, strict=False):
            of_sequence = (p.view(1, -1, 1) * (layers * 2 * self._half) + tile).view(kv_heads, 1, -1)
            for last in range(context - plan.decode_queries + 1, context + 1):
                seen = of_sequence[:, :, max(0, last - window) if window else 0 : last]
                rows.append(seen.expand(kv_heads, group, -1).reshape(-1))
                keys.append(seen.shape[2])
        self.rows = torch.cat(rows)
        ends = torch.tensor(keys).repeat_interleave(heads).cumsum(0)
        starts = torch.cat((ends.new_zeros(1), ends))
        self.bags = starts[:-1]
        self._span = (pool_pages * layers * 2 - (2 * layers - 1)) * self._half
        _quiet_sparse()
        self.sparse = torch.sparse_csr_tensor(
            starts,
            self.rows,
            torch.zeros(len(self.rows)),
            size=(len(ends), self._span),
            check_invariants=False,
        )
        self.values = self.sparse.values()
        self.by_token = [part.view(heads, -1) for part in torch.split(self.values, [n * heads for n in keys])]

    def keys_and_values(self, cache: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer as [rows, d] float32, from their first row on."""
        if self._widened is not None:
            cache, layer = self._widened.read(cache, layer), 0
        d = cache.shape[-1]
        k_start = cache.storage_offset() + layer * 2 * self._half * d
        size, stride = (self._span, d), (d, 1)
        return cache.as_strided(size, stride, k_start), cache.as_strided(size, stride, k_start + self._half * d)


class _Widened:
    """Half-width pages of one layer as a float32 pool of their own, in the order of the plan."""

    def __init__(self, pages: Tensor, cache: Tensor) -> None:
        self.pages = pages
        # Kept for all layers: fresh memory of this size would be mapped anew each time, at three times the cost.
        self._half = cache.new_empty(len(pages), cache[0, 0].numel())
        self._full = torch.empty(self._half.shape)

    def read(self, cache: Tensor, layer: int) -> Tensor:
        """[rows, d] float32, valid until the next call."""
        pool = cache.view(-1, self._half.shape[1])  # [pages * layers, elements of a page's layer]
        torch.index_select(pool, 0, self.pages * cache.shape[1] + layer, out=self._half)
        return self._full.copy_(self._half).view(-1, cache.shape[5])


@run_once
def _quiet_sparse() -> None:
    """Sparse CSR says once a process that it is in beta; the only operation used here is a plain gathered product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), size=(1, 1))

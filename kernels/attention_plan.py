"""What a step's attention needs to know, checked and computed once for all layers."""

from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


class AttentionPlan:
    """One step's sequences. Built once a step, used by every layer.

    page_table   [seqs, max_pages] int32: the pool's page that holds a sequence's tokens [i * page_size, ...); slots
                 past a sequence's context may hold anything
    query_starts [seqs + 1] int32: sequence i's queries are the tokens query_starts[i] .. query_starts[i + 1]
    context_lens [seqs] int32: tokens to attend to, the queries included; they are the tail of their context
    num_decodes  the first so many sequences have `decode_queries` queries each; the others are prefill chunks
    starts, contexts: query_starts and context_lens as lists, where the host has them. On a GPU nothing is then read
                 back, which would wait for all that it computes; the numbers in page_table are not checked there.
    decode_queries: more than one where a step verifies tokens that were guessed
    batch_invariant: a decode's result is bitwise the same whatever else is in the batch

    The tensors are on the device that computes. Raises ValueError naming the argument that is wrong.
    """

    def __init__(
        self,
        page_table: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        num_decodes: int,
        page_size: int,
        starts: list[int] | None = None,
        contexts: list[int] | None = None,
        *,
        decode_queries: int = 1,
        batch_invariant: bool = False,
    ) -> None:
        self.page_table = page_table
        self.query_starts = query_starts
        self.context_lens = context_lens
        self.num_decodes = num_decodes
        self.decode_queries = decode_queries
        self.batch_invariant = batch_invariant
        self.page_size = page_size
        self._once: dict[Hashable, object] = {}
        self._check_tensors()
        self.starts: list[int] = query_starts.tolist() if starts is None else starts  # [seqs + 1]
        self.contexts: list[int] = context_lens.tolist() if contexts is None else contexts
        self.queries = [end - start for start, end in pairwise(self.starts)]
        self._check_lengths()
        self.trusted = page_table.is_cuda and contexts is not None  # the numbers in page_table are not looked at

    @property
    def num_tokens(self) -> int:
        """Queries of all sequences."""
        return self.starts[-1]

    @property
    def decode_tokens(self) -> int:
        """Queries of the leading sequences that are decodes."""
        return self.num_decodes * self.decode_queries

    def pages(self) -> list[Tensor]:
        """Each sequence's pages, [pages] int64: views of one tensor."""
        counts = [-(-context // self.page_size) for context in self.contexts]
        return list(torch.split(self._used_pages(), counts))

    def once(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` gives, computed once a plan for each key: the layers share it."""
        if key not in self._once:
            self._once[key] = build()
        return cast(T, self._once[key])

    def check(self, q: Tensor, cache: Tensor, layer: int, tokens: int) -> None:
        """Whether q [tokens, heads, d] and a layer of the pool go with this plan. The pool is looked at once."""
        key = ("checked", cache.shape, cache.stride(), cache.device)
        _, layers, _, kv_heads, _, d = self.once(key, lambda: self._check_pool(cache))
        if q.ndim != 3 or q.shape[0] != tokens or q.shape[2] != d or q.shape[1] % kv_heads:
            raise ValueError(f"q must be [{tokens}, a multiple of {kv_heads}, {d}], not {list(q.shape)}")
        if q.device != cache.device:
            raise ValueError(f"q is on {q.device}, cache on {cache.device}")
        if not 0 <= layer < layers:
            raise ValueError(f"layer {layer} of a cache of {layers} layers")

    def _check_pool(self, cache: Tensor) -> torch.Size:
        if cache.ndim != 6 or cache.shape[2] != 2 or not cache.is_contiguous():
            raise ValueError("cache must be [pages, layers, 2, kv_heads, page_size, d], contiguous")
        if cache.shape[4] != self.page_size:
            raise ValueError(f"cache has pages of {cache.shape[4]} tokens, page_size is {self.page_size}")
        if cache.device != self.page_table.device:
            raise ValueError(f"cache is on {cache.device}, page_table on {self.page_table.device}")
        if not self.trusted:
            lowest, highest = (int(page) for page in torch.aminmax(self._used_pages()))
            if lowest < 0 or highest >= cache.shape[0]:
                raise ValueError(f"page_table names pages {lowest}..{highest} of a cache of {cache.shape[0]}")
        return cache.shape

    def _check_tensors(self) -> None:
        names = {"page_table": 2, "query_starts": 1, "context_lens": 1}
        for name, dimensions in names.items():
            tensor = getattr(self, name)
            if tensor.ndim != dimensions or tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous int32 of {dimensions} dimensions")
            if tensor.device != self.page_table.device:
                raise ValueError(f"{name} is on {tensor.device}, page_table on {self.page_table.device}")
        seqs = self.context_lens.shape[0]
        if seqs == 0 or self.page_table.shape[0] != seqs:
            raise ValueError(f"page_table has {self.page_table.shape[0]} rows, context_lens {seqs}")
        if self.query_starts.shape[0] != seqs + 1:
            raise ValueError(f"query_starts has {self.query_starts.shape[0]} elements for {seqs} sequences")

    def _check_lengths(self) -> None:
        seqs = self.context_lens.shape[0]
        if len(self.queries) != seqs or len(self.contexts) != seqs:
            raise ValueError(f"starts and contexts are for {len(self.queries)} and {len(self.contexts)}, not {seqs}")
        if self.starts[0] != 0 or min(self.queries) < 1:
            raise ValueError("query_starts must begin at 0 and rise by one query at least")
        if any(context < queries for context, queries in zip(self.contexts, self.queries, strict=True)):
            raise ValueError("context_lens must count a sequence's own queries")
        if max(self.contexts) > self.page_table.shape[1] * self.page_size:
            raise ValueError(f"context_lens: {max(self.contexts)} tokens do not fit a row of page_table")
        if not 0 <= self.num_decodes <= len(self.queries):
            raise ValueError(f"num_decodes is {self.num_decodes} of {len(self.queries)} sequences")
        if any(queries != self.decode_queries for queries in self.queries[: self.num_decodes]):
            raise ValueError(f"num_decodes: each of these sequences must have {self.decode_queries} queries")

    def _used_pages(self) -> Tensor:
        """[pages of all sequences, in order] int64"""
        return self.once("used pages", self._find_used_pages)

    def _find_used_pages(self) -> Tensor:
        column = torch.arange(self.page_table.shape[1], device=self.page_table.device)
        counts = (self.context_lens + (self.page_size - 1)) // self.page_size
        return self.page_table[column < counts.unsqueeze(1)].long()


def check_lse(lse: Tensor | None, q: Tensor) -> None:
    """Whether `lse`, where it is given, can hold the log-sum-exps of q [tokens, heads, d]: float32 [tokens, heads]."""
    if lse is not None and (lse.shape != q.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise ValueError(f"lse must be contiguous float32 {list(q.shape[:2])}")

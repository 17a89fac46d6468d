"""Attention over paged KV, computed by the textbook in float64, and pools that punish a read out of place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention_plan import AttentionPlan

LAYERS = 3


@dataclass(frozen=True)
class Case:
    """Sequences in a pool of pages that holds NaN wherever no token of theirs lies."""

    q: Tensor  # [tokens, heads, d]
    cache: Tensor  # [pages, layers, 2, kv_heads, page_size, d]
    page_table: Tensor  # [seqs, max_pages] int32
    contexts: list[int]
    queries: list[int]

    def plan(self, decode_queries: int = 1, batch_invariant: bool = False) -> AttentionPlan:
        """Leading sequences of `decode_queries` queries are decodes."""
        chunked = [index for index, count in enumerate(self.queries) if count != decode_queries]
        return AttentionPlan(
            page_table=self.page_table,
            query_starts=torch.tensor([0, *self.queries]).cumsum(0).int(),
            context_lens=torch.tensor(self.contexts, dtype=torch.int32),
            num_decodes=chunked[0] if chunked else len(self.queries),
            page_size=self.cache.shape[4],
            decode_queries=decode_queries,
            batch_invariant=batch_invariant,
        )

    def alone(self, index: int) -> "Case":
        """One of the sequences, in the same pool."""
        start = sum(self.queries[:index])
        return Case(
            self.q[start : start + self.queries[index]],
            self.cache,
            self.page_table[index : index + 1].contiguous(),
            [self.contexts[index]],
            [self.queries[index]],
        )

    def expected(self, layer: int, window: int = 0, soft_cap: float = 0.0) -> tuple[Tensor, Tensor]:
        """(out [tokens, heads, d], lse [tokens, heads]), float64."""
        outs, lses, start = [], [], 0
        for row, context, count in zip(self.page_table, self.contexts, self.queries, strict=True):
            out, lse = self._one(self.q[start : start + count].double(), row, context, layer, window, soft_cap)
            outs.append(out)
            lses.append(lse)
            start += count
        return torch.cat(outs), torch.cat(lses)

    def _one(
        self, q: Tensor, row: Tensor, context: int, layer: int, window: int, soft_cap: float
    ) -> tuple[Tensor, Tensor]:
        page_size = self.cache.shape[4]
        position = torch.arange(context)
        pages = row[position // page_size].long()
        k, v = self.cache[pages, layer, :, :, position % page_size].double().unbind(1)  # [context, kv_heads, d]
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        last = (context - len(q) + torch.arange(len(q)))[:, None]
        hidden = (position > last) | (position <= last - (window or context))
        scores = scores.masked_fill(hidden, -math.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).T


def make_case(
    contexts: Sequence[int],
    queries: Sequence[int],
    *,
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    """Random tokens in shuffled pages. Unused slots of the page table name no page at all."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // page_size) for context in contexts]
    pages = torch.randperm(sum(counts) + 4, generator=generator)
    cache = torch.full((len(pages), LAYERS, 2, kv_heads, page_size, head_dim), math.nan, dtype=dtype)
    table = torch.full((len(counts), max(counts) + 2), 10**6, dtype=torch.int32)
    for row, context, own in zip(table, contexts, torch.split(pages[: sum(counts)], counts), strict=True):
        row[: len(own)] = own
        position = torch.arange(context)
        tokens = torch.randn(context, LAYERS, 2, kv_heads, head_dim, generator=generator)
        cache[own[position // page_size], :, :, :, position % page_size] = tokens.to(dtype)
    q = torch.randn(sum(queries), heads, head_dim, generator=generator) * scale
    return Case(q.to(dtype), cache, table, list(contexts), list(queries))


def with_shared_prefix(case: Case, prefix: int) -> Case:
    """The same sequences, but that all of them begin with the first one's `prefix` tokens, in the same pages."""
    pages = prefix // case.cache.shape[4]
    table = case.page_table.clone()
    table[:, :pages] = table[0, :pages]
    return Case(case.q, case.cache, table, case.contexts, case.queries)

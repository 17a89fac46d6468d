"""One step's prompt chunks as a packed batch on the device, made from what the host knows: nothing is read back."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import ForwardBatch
from engine.scheduler import Chunk
from kernels.attention import AttentionPlan
from kernels.upload import upload

Array = npt.NDArray[Any]


class Packed(NamedTuple):
    """Chunks one after the other, on the host."""

    token_ids: Array  # [tokens] int64
    positions: Array  # [tokens] int64
    slots: Array  # [tokens] int64
    logit_rows: Array  # [rows] int64: the last token of each chunk that `is_last`, then those that score a prompt
    page_table: Array  # [chunks, most pages] int32; slots past a sequence's pages are never read
    queries: Array  # [chunks] int64
    contexts: Array  # [chunks] int64

    @classmethod
    def of(cls, chunks: Sequence[Chunk], page_size: int) -> "Packed":
        queries = np.array([chunk.count for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        ends = np.cumsum(queries)
        owner = np.repeat(np.arange(len(chunks)), queries)  # [tokens]
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + queries, queries)  # [tokens]
        table = _page_table(chunks)
        slots = table[owner, positions // page_size].astype(np.int64) * page_size + positions % page_size
        rows = _logit_rows(chunks, ends)
        return cls(_token_ids(chunks), positions, slots, rows, table, queries, starts + queries)


def pack(chunks: Sequence[Chunk], page_size: int, device: torch.device, num_decodes: int = 0) -> ForwardBatch:
    """The chunks as one batch on the device. The first `num_decodes` have one token each and count as decode rows."""
    packed = Packed.of(chunks, page_size)
    starts = [0, *np.cumsum(packed.queries).tolist()]
    lengths = [np.array(starts, dtype=np.int32), packed.contexts.astype(np.int32)]
    token_ids, positions, slots, rows, table, query_starts, contexts = upload([*packed[:5], *lengths], device)
    plan = AttentionPlan(table, query_starts, contexts, num_decodes, page_size, starts, packed.contexts.tolist())
    return ForwardBatch(token_ids, positions, slots, rows, plan)


def _token_ids(chunks: Sequence[Chunk]) -> Array:
    tokens = chain.from_iterable(chunk.sequence.tokens[chunk.start : chunk.end] for chunk in chunks)
    return np.fromiter(tokens, np.int64)


def _logit_rows(chunks: Sequence[Chunk], ends: Array) -> Array:
    last = [int(end) - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.is_last]
    firsts = [int(end) - chunk.count for chunk, end in zip(chunks, ends, strict=True)]
    scored = [range(first, first + chunk.scored) for chunk, first in zip(chunks, firsts, strict=True)]
    return np.array([*last, *chain.from_iterable(scored)], dtype=np.int64)


def _page_table(chunks: Sequence[Chunk]) -> npt.NDArray[np.int32]:
    table = np.zeros((len(chunks), max(len(chunk.sequence.pages) for chunk in chunks)), dtype=np.int32)
    for row, chunk in zip(table, chunks, strict=True):
        row[: len(chunk.sequence.pages)] = chunk.sequence.pages
    return table

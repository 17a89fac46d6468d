"""Runs one step's chunks through the model: lists in, sampled ids out."""

from itertools import takewhile

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import EngineConfig
from engine.model import Decoder
from engine.sampler import SamplingBatch, sample
from engine.scheduler import Chunk
from kernels.attention import AttentionPlan


class ModelRunner:
    """The torch side of an engine. `cache` is [pages, layers, 2, kv_heads, page_size, head_dim]."""

    def __init__(self, model: Decoder, cache: Tensor, config: EngineConfig) -> None:
        self._model = model
        self._cache = cache
        self._page_size = config.page_size

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[int]:
        """Compute the chunks; returns a sampled id for each chunk that `is_last`, in order."""
        logits = self._model.forward(self._batch(chunks), self._cache)  # [rows, vocab]
        wanted = [chunk.sequence for chunk in chunks if chunk.is_last]
        if not wanted:
            return []
        rows = SamplingBatch([s.sampling for s in wanted], positions=[len(s.tokens) for s in wanted])
        ids: list[int] = sample(logits, rows).tolist()
        return ids

    def _batch(self, chunks: list[Chunk]) -> ForwardBatch:
        device = self._cache.device
        counts = torch.tensor([chunk.count for chunk in chunks])
        starts = torch.tensor([chunk.sequence.computed for chunk in chunks])
        ends = torch.cumsum(counts, 0)
        owner = torch.repeat_interleave(torch.arange(len(chunks)), counts)  # [tokens]
        positions = torch.arange(int(ends[-1])) - (ends - counts)[owner] + starts[owner]
        page_table = self._page_table(chunks)
        pages = page_table[owner, positions // self._page_size].long()
        token_ids = [
            token
            for chunk in chunks
            for token in chunk.sequence.tokens[chunk.sequence.computed : chunk.sequence.computed + chunk.count]
        ]
        plan = AttentionPlan(
            page_table=page_table.to(device),
            query_starts=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int().to(device),
            context_lens=(starts + counts).int().to(device),
            num_decodes=len(list(takewhile(lambda chunk: chunk.count == 1, chunks))),
            page_size=self._page_size,
        )
        return ForwardBatch(
            token_ids=torch.tensor(token_ids).to(device),
            positions=positions.to(device),
            slots=(pages * self._page_size + positions % self._page_size).to(device),
            logit_rows=(ends - 1)[torch.tensor([chunk.is_last for chunk in chunks])].to(device),
            plan=plan,
        )

    @staticmethod
    def _page_table(chunks: list[Chunk]) -> Tensor:
        """[seqs, max_pages] int32; slots past a sequence's pages are never read."""
        widest = max(len(chunk.sequence.pages) for chunk in chunks)
        return torch.tensor(
            [[*chunk.sequence.pages, *[0] * (widest - len(chunk.sequence.pages))] for chunk in chunks],
            dtype=torch.int32,
        )

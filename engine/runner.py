"""Runs one step's chunks through the model: lists in, sampled ids out."""

from itertools import takewhile

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import EngineConfig
from engine.engine import Done
from engine.logprobs import token_logprobs
from engine.model import Decoder
from engine.packing import pack
from engine.sampler import sample
from engine.scheduler import Chunk
from engine.sequence import Sequence

# Rows of a prompt whose logits are held at once: 64 rows of 128k ids are 32 MiB.
_SCORED_ROWS = 64


class ModelRunner:
    """The torch side of an engine. `cache` is [pages, layers, 2, kv_heads, page_size, head_dim]."""

    behind = 0

    def __init__(self, model: Decoder, cache: Tensor, config: EngineConfig) -> None:
        self._model = model
        self._cache = cache
        self._page_size = config.page_size

    def launch(self, chunks: list[Chunk]) -> Done:
        """Compute the chunks."""
        return Done(self.run(chunks))

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[int]:
        """Compute the chunks; returns a sampled id for each chunk that `is_last`, in order.

        Log-probabilities that a sequence asks for are added to it.
        """
        hidden = self._model.hidden(self._batch(chunks), self._cache)  # [rows, hidden]
        wanted = [chunk.sequence for chunk in chunks if chunk.is_last]
        self._score_prompts(chunks, hidden[len(wanted) :])
        return self._sample(wanted, hidden[: len(wanted)]) if wanted else []

    def _sample(self, sequences: list[Sequence], hidden: Tensor) -> list[int]:
        logits = self._model.logits(hidden)  # [sequences, vocab]
        ids: list[int] = sample(logits, sequences).tolist()
        for row, sequence in enumerate(sequences):
            if (top := sequence.sampling.logprobs) is not None:
                sequence.logprobs += token_logprobs(logits[row : row + 1], ids[row : row + 1], top)
        return ids

    def _score_prompts(self, chunks: list[Chunk], hidden: Tensor) -> None:
        """hidden [scored rows of all chunks, hidden]: each row says how probable the prompt's next token was."""
        for chunk in chunks:
            for start in range(0, chunk.scored, _SCORED_ROWS):
                rows = min(_SCORED_ROWS, chunk.scored - start)
                first = chunk.start + start + 1
                targets = chunk.sequence.tokens[first : first + rows]
                top = chunk.sequence.sampling.prompt_logprobs or 0
                chunk.sequence.prompt_logprobs += token_logprobs(self._model.logits(hidden[:rows]), targets, top)
                hidden = hidden[rows:]

    def _batch(self, chunks: list[Chunk]) -> ForwardBatch:
        num_decodes = sum(1 for _ in takewhile(lambda chunk: chunk.count == 1, chunks))
        return pack(chunks, self._page_size, self._cache.device, num_decodes)

"""Runs steps on a GPU without waiting for it: the host reads a step's tokens while the next one runs."""

import numpy as np
import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import EngineConfig
from engine.decode_graph import DecodeGraphs
from engine.graph_pool import GraphPool
from engine.logprob_reading import LogprobReading, Wanted
from engine.model import Decoder
from engine.packing import pack
from engine.prefill_graph import PrefillGraphs
from engine.reading import Reading
from engine.resident_batch import ResidentBatch
from engine.resident_sampling import Kind, ResidentSampling
from engine.scheduler import Chunk
from engine.seating import Seating
from engine.sequence import Sequence
from kernels.attention import AttentionPlan
from kernels.capability import has_hopper_decode, has_hopper_prefill
from kernels.resident_rows import row_places
from kernels.upload import upload
from kernels.warm_up import warm_up

# Rows of a prompt whose logits are held at once: 64 rows of 128k ids are 16 MiB.
_SCORED_ROWS = 64


class DeviceRunner:
    """Decode rows stay on the device, each in its seat, and go on by themselves; prompts are packed anew in each step.

    On Hopper the decode step is a CUDA graph, and so is a prefill of few tokens. Elsewhere, and so also on a CPU, they
    are called as they are.
    """

    behind = 1

    def __init__(self, model: Decoder, cache: Tensor, config: EngineConfig) -> None:
        """`cache` is [pages, layers, 2, kv_heads, page_size, head_dim] on the model's device."""
        self._model = model
        self._cache = cache
        self._page_size = config.page_size
        self._device = cache.device
        rows = config.max_sequences
        columns = min(-(-model.config.max_positions // config.page_size), cache.shape[0])
        self._seating = Seating(rows)
        self._batch = ResidentBatch(rows, columns, self._device)
        self._sampling = ResidentSampling(rows, model.config.vocab, self._device)
        pinned = self._device.type == "cuda"
        self._buffers = [torch.empty(rows, dtype=torch.int64, pin_memory=pinned) for _ in range(1 + self.behind)]
        self._seated: list[Sequence] = []  # who is in the last step, decode rows first
        self._rows: list[int] = []  # theirs
        self._kinds: list[Kind] = []
        self._watched: set[Sequence] = set()  # of them, who may not say certain runs of tokens
        self._last: Reading | None = None
        self._decode_graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        self._record(columns, config.token_budget)

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Reading:
        """Start computing the chunks: decode rows by one step of the resident batch, prompts after them."""
        self._seat([chunk for chunk in chunks if chunk.is_last])
        rows = [chunk for chunk in chunks if chunk.is_row]
        logprobs: list[LogprobReading] = []
        if rows:
            logprobs += self._decode(rows)
        if len(rows) < len(chunks):
            logprobs += self._prefill(chunks[len(rows) :])
        return self._read(logprobs)

    def last_event(self) -> torch.cuda.Event | None:
        """Behind everything that was launched; None where nothing was, or where `launch` computes."""
        return self._last.arrived if self._last else None

    @torch.inference_mode()
    def _record(self, columns: int, most_tokens: int) -> None:
        """Make the graphs that there are kernels for."""
        config, pool = self._model.config, GraphPool()
        q = self._cache.new_empty(1, config.heads, config.head_dim)
        if has_hopper_decode(q, self._cache):
            sizes = self._seating.sizes
            self._decode_graphs = DecodeGraphs(self._model, self._cache, self._batch, self._sampling, pool, sizes)
        if has_hopper_prefill(q, self._cache) and not any(config.windows):
            self._prefill_graphs = PrefillGraphs(self._model, self._cache, pool, columns, most_tokens)
        made = [graphs for graphs in (self._prefill_graphs, self._decode_graphs) if graphs is not None]
        warm_up([call for graphs in made for call in graphs.warm_ups()])
        for graphs in made:
            graphs.record()

    def _seat(self, sampled: list[Chunk]) -> None:
        """Bring the resident batch up to date with who is in this step."""
        sequences = [chunk.sequence for chunk in sampled]
        banned_after = {sequence: self._tokens(sequence) for sequence in self._watched}
        if sequences != self._seated:
            self._change_seats(sampled, sequences)
        for row, sequence in zip(self._rows, sequences, strict=True):
            self._batch.grow(row, sequence.pages)
        for sequence in self._watched & banned_after.keys():
            self._sampling.edit(self._seating.row(sequence), sequence, banned_after[sequence])
        self._batch.flush()
        self._sampling.flush()

    def _change_seats(self, sampled: list[Chunk], sequences: list[Sequence]) -> None:
        """Who sits already keeps its row's content: the step before has sampled its token, on the device."""
        new = [chunk for chunk in sampled if chunk.sequence not in self._seating]
        changes = self._seating.seat(sequences)
        self._move(changes.moved)
        for row in changes.emptied:
            self._batch.empty(row)
        self._seated, self._rows = sequences, [self._seating.row(sequence) for sequence in sequences]
        self._kinds = [Kind.of(sequence.sampling) for sequence in sequences]
        self._watched = {sequence for sequence in sequences if _has_runs(sequence)}
        for chunk in new:
            self._fill(self._seating.row(chunk.sequence), chunk)

    def _move(self, moved: list[tuple[int, int]]) -> None:
        if moved:
            (rows,) = upload([np.array(moved).T], self._device)
            self._batch.move(moved, rows)
            self._sampling.move(moved, rows)

    def _fill(self, row: int, chunk: Chunk) -> None:
        """Seat a sequence to decode in this step, or from the next one on: then `_prefill` does what is left."""
        sequence = chunk.sequence
        if chunk.is_row:
            self._batch.fill(row, sequence.tokens[chunk.start], chunk.end, sequence.pages)
            self._sampling.fill(row, sequence)
        else:
            self._batch.fill(row, 0, 0, sequence.pages)

    def _tokens(self, sequence: Sequence) -> list[int]:
        """All of its tokens: waits for the one that is on the device."""
        assert self._last is not None
        self._last.wait()
        return [*sequence.tokens, int(self._last.tokens[self._seating.row(sequence)])]

    def _decode(self, chunks: list[Chunk]) -> list[LogprobReading]:
        rows = self._rows[: len(chunks)]
        kind = max(self._kinds[: len(chunks)])
        if self._decode_graphs is not None:
            logits = self._decode_graphs.run(self._seating.size, kind)
            return self._score(chunks, logits, rows)
        logits = self._call_step(chunks, rows, kind)
        return self._score(chunks, logits, list(range(len(rows))))

    def _call_step(self, chunks: list[Chunk], rows: list[int], kind: Kind) -> Tensor:
        """What the graphs do, for the rows alone that sit there: logits [chunks, vocab]."""
        batch = self._batch
        starts, contexts = list(range(len(rows) + 1)), [chunk.end for chunk in chunks]
        places, query_starts = upload([np.array(rows), np.array(starts, dtype=np.int32)], self._device)
        table, lengths = batch.page_table[places], batch.context_lens[places]
        plan = AttentionPlan(table, query_starts, lengths, len(rows), self._page_size, starts, contexts)
        positions, slots = row_places(lengths, table, self._page_size)
        step = ForwardBatch(batch.token_ids[places], positions, slots, None, plan)
        logits = self._model.lm_head(self._model.hidden(step, self._cache))
        batch.next_tokens(places, self._sampling.sample(logits, places, lengths.long(), kind), lengths + 1)
        return logits

    def _prefill(self, chunks: list[Chunk]) -> list[LogprobReading]:
        hidden = self._prefill_graphs.run(chunks) if self._prefill_graphs is not None else None
        if hidden is None:
            hidden = self._model.hidden(pack(chunks, self._page_size, self._device), self._cache)
        last = [chunk for chunk in chunks if chunk.is_last]
        logprobs = self._score_prompts(chunks, hidden[len(last) :])
        if not last:
            return logprobs
        rows = self._rows[len(self._rows) - len(last) :]  # decode rows come before them
        for row, chunk in zip(rows, last, strict=True):  # not before this step's decode, which samples in every row
            self._sampling.fill(row, chunk.sequence)
        self._sampling.flush()
        ends = [chunk.end for chunk in last]
        # A sequence whose last token this is does not decode: its row stays without a context.
        contexts = [chunk.end + 1 if chunk.end < chunk.sequence.max_len - 1 else 0 for chunk in last]
        arrays = [np.array(rows), np.array(ends), np.array(contexts, dtype=np.int32)]
        places, positions, lengths = upload(arrays, self._device)
        logits = self._model.lm_head(hidden[: len(last)])
        kind = max(self._kinds[len(self._rows) - len(last) :])
        self._batch.next_tokens(places, self._sampling.sample(logits, places, positions, kind), lengths)
        return logprobs + self._score(last, logits, list(range(len(last))))

    def _score(self, chunks: list[Chunk], logits: Tensor, logit_rows: list[int]) -> list[LogprobReading]:
        """Of the chunks' new tokens, where they are wanted. Each chunk's logits are in its row of `logits`."""
        wanted = [
            (logit_row, self._seating.row(chunk.sequence), Wanted(chunk.sequence, chunk.sequence.logprobs, top))
            for chunk, logit_row in zip(chunks, logit_rows, strict=True)
            if (top := chunk.sequence.sampling.logprobs) is not None
        ]
        if not wanted:
            return []
        logit_places, places = upload(
            [np.array([w[0] for w in wanted]), np.array([w[1] for w in wanted])], self._device
        )
        return [LogprobReading(logits[logit_places], self._batch.token_ids[places], [want for *_, want in wanted])]

    def _score_prompts(self, chunks: list[Chunk], hidden: Tensor) -> list[LogprobReading]:
        """hidden [scored rows of all chunks, hidden]: each row says how probable the prompt's next token was."""
        readings = []
        for chunk in chunks:
            sequence = chunk.sequence
            for first in range(chunk.start, chunk.start + chunk.scored, _SCORED_ROWS):
                end = min(first + _SCORED_ROWS, chunk.start + chunk.scored)
                (targets,) = upload([np.array(sequence.tokens[first + 1 : end + 1])], self._device)
                want = Wanted(sequence, sequence.prompt_logprobs, sequence.sampling.prompt_logprobs or 0)
                logits = self._model.lm_head(hidden[: end - first])
                readings.append(LogprobReading(logits, targets, [want] * (end - first)))
                hidden = hidden[end - first :]
        return readings

    def _read(self, logprobs: list[LogprobReading]) -> Reading:
        """Send the rows' newest tokens to the host."""
        size = max(self._rows, default=-1) + 1
        self._buffers.append(self._buffers.pop(0))
        tokens = self._buffers[-1][:size].copy_(self._batch.token_ids[:size], non_blocking=True)
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(self._device))
        self._last = Reading(tokens, self._rows, logprobs, arrived)
        return self._last


def _has_runs(sequence: Sequence) -> bool:
    """Whether runs of several tokens are banned: what may come next then depends on the token before it."""
    return any(len(run) > 1 for run in sequence.sampling.bad_tokens)

"""A decode step of the whole resident batch as CUDA graphs."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.graph_pool import GraphPool
from engine.model import Decoder
from engine.resident_batch import ResidentBatch
from engine.resident_sampling import Kind, ResidentSampling
from kernels.attention import DecodePlan
from kernels.resident_rows import advance_rows, row_places
from kernels.sample import histogram_copies, sample


class DecodeGraphs:
    """One step for each size of the batch: the model's part, and for each kind of sampling what follows it.

    All `warm_ups` and then `record` come before the first `run`, and nobody may sit in the batch by then.
    """

    def __init__(
        self,
        model: Decoder,
        cache: Tensor,
        batch: ResidentBatch,
        sampling: ResidentSampling,
        pool: GraphPool,
        sizes: Sequence[int],
    ) -> None:
        self._model = model
        self._cache = cache
        self._batch = batch
        self._sampling = sampling
        self._pool = pool
        self._sizes = sorted(sizes, reverse=True)  # the largest is recorded first: the others fit in its memory
        self._plans: dict[int, DecodePlan] = {}
        self._logits: dict[int, Tensor] = {}
        self._forwards: dict[int, Callable[[], None]] = {}
        self._ends: dict[tuple[int, Kind], Callable[[], None]] = {}

    def warm_ups(self) -> list[Callable[[], None]]:
        """Calls, in any order and side by side, that compile and load the kernels of every step, and what samples."""
        m = self._model
        steps: list[Callable[[], None]] = [partial(self._forward, size) for size in self._sizes]
        smallest = {histogram_copies(size, m.config.vocab): size for size in self._sizes}  # of those with like kernels
        for size in smallest.values():
            logits = torch.zeros(size, m.config.vocab, dtype=m.cache_dtype, device=m.device)
            steps += [partial(self._end, logits, kind) for kind in Kind]
        return steps

    def record(self) -> None:
        """Make the graphs of the model's part; what follows it is recorded when it is first wanted."""
        for size in self._sizes:
            self._forwards[size] = self._pool.record(partial(self._forward, size))

    def run(self, size: int, kind: Kind) -> Tensor:
        """One token of each of the first `size` rows, and on to the next. Returns their logits [size, vocab], which the
        next step overwrites.
        """
        self._forwards[size]()
        if (size, kind) not in self._ends:
            self._ends[size, kind] = self._pool.record(lambda: self._end(self._logits[size], kind))
        self._ends[size, kind]()
        return self._logits[size]

    def _forward(self, size: int) -> None:
        batch = self._batch
        table, lengths = batch.page_table[:size], batch.context_lens[:size]
        plan = self._plans.setdefault(size, DecodePlan(table, lengths))
        plan.refresh()
        positions, slots = row_places(lengths, table, self._cache.shape[4])
        step = ForwardBatch(batch.token_ids[:size], positions, slots, None, plan)
        self._logits[size] = self._model.lm_head(self._model.hidden(step, self._cache))

    def _end(self, logits: Tensor, kind: Kind) -> None:
        """Sample from logits [size, vocab], and move the rows on."""
        size = logits.shape[0]
        lengths = self._batch.context_lens[:size]
        rows = self._sampling.first(size, kind)
        rows.positions.copy_(lengths)
        ids = sample(logits, rows, greedy=kind is Kind.GREEDY)
        advance_rows(self._batch.token_ids[:size], lengths, ids)

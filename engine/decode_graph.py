"""A decode step of the whole resident batch as CUDA graphs."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from engine.batch import ForwardBatch
from engine.graph_pool import GraphPool
from engine.model import Decoder
from engine.resident_batch import ResidentBatch
from engine.resident_sampling import Kind, ResidentSampling
from kernels.attention import DecodePlan
from kernels.resident_rows import advance_rows, row_places
from kernels.sample import sample


class DecodeGraphs:
    """One step for each size of the batch: the model's part, and for each kind of sampling what follows it.

    Nobody may sit in the batch when this is made: every step is run once, so that its kernels are compiled and loaded.
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
        self._plans: dict[int, DecodePlan] = {}
        self._logits: dict[int, Tensor] = {}
        self._forwards: dict[int, Callable[[], None]] = {}
        self._ends: dict[tuple[int, Kind], Callable[[], None]] = {}
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit in its memory
            self._forward(size)
            self._forwards[size] = self._pool.record(partial(self._forward, size))
        for kind in Kind:
            self._end(min(sizes), kind)

    def run(self, size: int, kind: Kind) -> Tensor:
        """One token of each of the first `size` rows, and on to the next. Returns their logits [size, vocab], which the
        next step overwrites.
        """
        self._forwards[size]()
        if (size, kind) not in self._ends:
            self._ends[size, kind] = self._pool.record(partial(self._end, size, kind))
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

    def _end(self, size: int, kind: Kind) -> None:
        """Sample, and move the rows on."""
        lengths = self._batch.context_lens[:size]
        rows = self._sampling.first(size, kind)
        rows.positions.copy_(lengths)
        ids = sample(self._logits[size], rows, greedy=kind is Kind.GREEDY)
        advance_rows(self._batch.token_ids[:size], lengths, ids)

"""Prefill of few tokens as CUDA graphs: launched one by one, a short prompt's kernels take longer than they run."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.graph_pool import GraphPool
from engine.model import Decoder
from engine.packing import Packed
from engine.scheduler import Chunk
from engine.static_inputs import StaticInputs
from kernels.attention import PrefillPlan

# Tokens. From 1,024 on the device is busy for longer than the host takes to launch.
SIZES = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_CHUNKS = 16
_ROUNDS = 32  # tiles of one program


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class PrefillGraphs:
    """One graph for each number of tokens; chunks that are fewer are filled up with tokens that leave no trace.

    All `warm_ups` and then `record` come before the first `run`.
    """

    def __init__(self, model: Decoder, cache: Tensor, pool: GraphPool, columns: int, most_tokens: int) -> None:
        """`columns`: pages of the longest sequence. Pages are left as they are."""
        self._model = model
        self._cache = cache
        self._pool = pool
        self._columns = columns
        programs = multiprocessors(cache.device)
        sizes = [size for size in SIZES if size <= most_tokens] or [most_tokens]
        blank = {
            "token_ids": np.zeros(sizes[-1], np.int64),
            "positions": np.zeros(sizes[-1], np.int64),
            "slots": np.full(sizes[-1], -1),
            "logit_rows": np.zeros(_CHUNKS, np.int64),
            "page_table": np.zeros((_CHUNKS, columns), np.int32),
            "records": np.zeros((programs, _ROUNDS, 8), np.int32),
            "counts": np.zeros(programs, np.int32),
        }
        self._inputs = StaticInputs(blank, cache.device)
        table, records, counts = (self._inputs[name] for name in ("page_table", "records", "counts"))
        self._plan = PrefillPlan(table, records, counts, cache.shape[4])
        self._hidden: dict[int, Tensor] = {}
        self._graphs: dict[int, Callable[[], None]] = {}
        self._sizes = sizes[::-1]  # the largest is recorded first: the others fit in its memory

    def warm_ups(self) -> list[Callable[[], None]]:
        """Calls, in any order and side by side, that compile and load the kernels of every size."""
        return [partial(self._forward, size) for size in self._sizes]

    def record(self) -> None:
        for size in self._sizes:
            self._graphs[size] = self._pool.record(partial(self._forward, size))

    def run(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """What `Decoder.hidden` gives for the chunks; None where no graph takes them, and nothing was done.

        The next run overwrites it.
        """
        tokens = sum(chunk.count for chunk in chunks)
        scored = any(chunk.scored for chunk in chunks)
        if tokens > max(self._graphs) or len(chunks) > _CHUNKS or scored:
            return None
        packed = Packed.of(chunks, self._plan.page_size)
        m = self._model.config
        tiles = self._plan.tiles(packed.queries.tolist(), packed.contexts.tolist(), m.heads, m.kv_heads, m.head_dim)
        if tiles is None:
            return None
        arrays = packed._asdict() | {"records": tiles[0], "counts": tiles[1]}
        self._inputs.load(arrays)
        size = min(size for size in self._graphs if size >= tokens)
        self._graphs[size]()
        return self._hidden[size][: len(packed.logit_rows)]

    def _forward(self, size: int) -> None:
        inputs = self._inputs
        batch = ForwardBatch(
            inputs["token_ids"][:size],
            inputs["positions"][:size],
            inputs["slots"][:size],
            inputs["logit_rows"],
            self._plan,
        )
        self._hidden[size] = self._model.hidden(batch, self._cache)

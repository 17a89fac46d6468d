"""CUDA graphs that share their memory."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch


class GraphPool:
    """Recorded calls: only one of them may run at a time."""

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """What launches on the current stream what `call` launches now. Its kernels must have run once before."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, which copy pages, may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            call()
        return graph.replay

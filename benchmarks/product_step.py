"""A stand-in for a decode step, and something that goes on beside it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ProductStep:
    """A CUDA graph of 64-row products over 2 GiB of weights, as in a decode step. A call gives its milliseconds."""

    def __init__(self, device: int) -> None:
        import torch

        torch.cuda.set_device(device)
        self.weights = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
        self.x = torch.randn(64, 8192, device="cuda", dtype=torch.bfloat16)
        _ = self.x @ self.weights[0]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for weight in self.weights:
                _ = self.x @ weight
        self.ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self) -> float:
        self.ends[0].record()
        self.graph.replay()
        self.ends[1].record()
        self.ends[1].synchronize()
        return float(self.ends[0].elapsed_time(self.ends[1]))


@contextmanager
def repeating(call: Callable[[], object]) -> Iterator[list[float]]:
    """The call over and over in another thread, and the seconds that each took."""
    taken: list[float] = []
    stopping = threading.Event()

    def run() -> None:
        while not stopping.is_set():
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)

    thread = threading.Thread(target=run)
    thread.start()
    yield taken
    stopping.set()
    thread.join()

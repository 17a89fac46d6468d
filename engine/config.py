"""What a worker is told at its start. Plain data: it travels to a Ray actor."""

from dataclasses import dataclass, field, replace
from typing import Self


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of one engine. `num_pages` counts pages of `page_size` tokens for all layers.

    0 leaves a size to the device, see `sized_for`.
    """

    page_size: int = 64
    num_pages: int = 0  # as many as gpu_memory has room for; on a CPU 256
    gpu_memory: float = 0.9  # share of its GPU's memory that the worker may take
    token_budget: int = 0  # most tokens in one step, prefill chunks and decode rows together
    max_sequences: int = 0  # most sequences in one step
    max_waiting: int = 1024  # most sequences that wait for room
    device: str = "auto"  # cuda: the first GPU that the process sees; cpu; auto: a GPU where there is one
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    load: str = "auto"  # auto: the model's weights; random: made from its config.json
    threads: int = 1

    def __post_init__(self) -> None:
        if 0 < self.token_budget < self.max_sequences:
            raise ValueError(
                f"token_budget ({self.token_budget}) must hold a token of each of max_sequences ({self.max_sequences})"
            )

    def sized_for(self, device: str) -> Self:
        """With all sizes but `num_pages`, which a GPU's free memory decides.

        A GPU computes 2,048 tokens at nearly the rate of more at once (docs/performance.md), and so small a step holds
        up neither decode rows nor the next prompt for long.
        """
        budget = self.token_budget or max(2048 if device == "cuda" else 512, self.max_sequences)
        sequences = self.max_sequences or min(256 if device == "cuda" else 64, budget)
        return replace(self, token_budget=budget, max_sequences=sequences)


@dataclass(frozen=True)
class WorkerConfig:
    """One worker of any pool. `model` is a directory that `engine.hub.resolve` returned."""

    worker_id: str
    model: str
    redis_url: str
    cluster: str = "diptych"  # prefix of every key in Redis
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free port
    engine: EngineConfig = field(default_factory=EngineConfig)
    transports: tuple[str, ...] = ("cuda_ipc", "shm", "tcp")  # offered to readers where they suit the pool, best first
    verify: str = "none"  # checksum: pages are named with one, and every copy is compared with it

"""What a page store is told at its start. Plain data: it travels to a Ray actor."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PageStoreConfig:
    """One node's page store. It follows the workers whose address has the same host."""

    store_id: str
    redis_url: str
    host_bytes: int  # of memory for pages; taken as pages arrive
    cluster: str = "diptych"  # prefix of every key in Redis
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free port
    disk_dir: Path | None = None  # of this store alone; None: no disk tier
    disk_bytes: int = 0
    transports: tuple[str, ...] = ("cuda_ipc", "shm", "tcp")  # both to take pages and to give them, best first

    def __post_init__(self) -> None:
        if self.host_bytes < 1:
            raise ValueError(f"host_bytes must be at least 1, not {self.host_bytes}")
        if self.disk_bytes < 0:
            raise ValueError(f"disk_bytes must be at least 0, not {self.disk_bytes}")

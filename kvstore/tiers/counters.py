"""What the tiers have done so far."""

from dataclasses import dataclass


@dataclass
class TierCounters:
    """Pages since the start, but for `disk_errors`."""

    arrived: int = 0  # came from workers
    stale: int = 0  # a worker had freed them by the time they were copied: thrown away
    hits: int = 0  # were located
    demoted: int = 0  # host to disk
    promoted: int = 0  # disk to host
    dropped: int = 0  # left the store for want of room
    dropped_corrupt: int = 0  # files that were torn, altered, or of another format: deleted
    disk_errors: int = 0  # writes and reads that the disk refused

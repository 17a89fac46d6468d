"""Hand-over pins: pages that a request's reader elsewhere may still pull."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.pool import PageId, PagePool


@dataclass
class _Pin:
    owner: str
    deadline: float
    pages: dict[PageId, None] = field(default_factory=dict)  # in the order of the sequence


class PinTable:
    """Keeps pages readable for requests: each until its release, its router's end or its deadline.

    The clock is passed in (monotonic seconds). Every call may be repeated: a second release does nothing.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pins: dict[str, _Pin] = {}
        self._earliest = math.inf  # no pin ends before this, so that most calls of `expire` look at nothing

    def __len__(self) -> int:
        return len(self._pins)

    def hold(self, request_id: str, owner: str, pages: Sequence[PageId], deadline: float) -> None:
        """Acquire those of `pages` that the request does not pin yet; its owner and deadline become these.

        Raises what `PagePool.acquire` raises, and then pins nothing more.
        """
        pin = self._pins.get(request_id)
        new = dict.fromkeys(page for page in pages if pin is None or page not in pin.pages)
        self._pool.acquire(list(new))
        if pin is None:
            pin = self._pins[request_id] = _Pin(owner, deadline)
        pin.owner, pin.deadline = owner, deadline
        pin.pages |= new
        self._earliest = min(self._earliest, deadline)

    def release(self, request_id: str) -> None:
        """The request's pages have been pulled, or nobody wants them any more."""
        pin = self._pins.pop(request_id, None)
        if pin is not None:
            self._pool.release(reversed(pin.pages))

    def drop_owner(self, owner: str) -> list[str]:
        """Release all that was held for a router that is gone; returns the requests."""
        gone = [request_id for request_id, pin in self._pins.items() if pin.owner == owner]
        for request_id in gone:
            self.release(request_id)
        return gone

    def expire(self, now: float) -> list[str]:
        """Release every pin whose deadline has come; returns the requests."""
        if now < self._earliest:
            return []
        gone = [request_id for request_id, pin in self._pins.items() if pin.deadline <= now]
        for request_id in gone:
            self.release(request_id)
        self._earliest = min((pin.deadline for pin in self._pins.values()), default=math.inf)
        return gone

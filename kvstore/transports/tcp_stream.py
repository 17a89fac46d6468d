"""One connection of a reader to an owner. Page bytes go from the socket to the pool with no copy in Python."""

import socket
import time
from collections.abc import Sequence

import numpy as np

from kvstore.cuda import CudaError, Event
from kvstore.pool import PageId
from kvstore.segment_base import SegmentBase
from kvstore.transports import tcp_wire as wire
from kvstore.transports.base import STAGE, PageRef
from kvstore.transports.host_window import open_window
from protos import errors

CONNECT_S = 2.0


class TcpStream:
    """Used by one thread at a time, but for `wake`. Raises `WorkerLost` where nobody answers at `address`."""

    def __init__(self, address: str, incarnation: int, segment: SegmentBase) -> None:
        self._address = address
        self._incarnation = incarnation
        self._window = open_window(segment)
        host, _, port = address.rpartition(":")
        try:
            self._connection = socket.create_connection((host.strip("[]"), int(port)), CONNECT_S)
        except (OSError, ValueError, OverflowError) as error:
            raise errors.WorkerLost(f"{address}: {error}", stage=STAGE) from error
        wire.configure(self._connection)

    def copy(self, refs: Sequence[PageRef], into: Sequence[PageId], deadline: float, after: Event | None) -> list[int]:
        """Ask for pages and take them; returns the generations that they had after their bytes were sent."""
        found: list[int] = []
        started = time.monotonic()
        try:
            for start in range(0, len(refs) or 1, wire.MAX_PAGES):
                end = start + wire.MAX_PAGES
                found += self._request(refs[start:end], into[start:end], deadline, after)
        except OSError as error:
            late = isinstance(error, TimeoutError)
            reason = f"no answer in {max(0.0, deadline - started):.1f} s" if late else str(error)
            raise errors.WorkerLost(f"{self._address}: {reason}", stage=STAGE) from error
        except CudaError:
            self.close()  # bytes of this reply are still on their way
            raise
        return found

    def _request(
        self, refs: Sequence[PageRef], into: Sequence[PageId], deadline: float, after: Event | None
    ) -> list[int]:
        head = wire.REQUEST.pack(wire.MAGIC, len(refs), self._incarnation)
        body = b"".join(wire.REF.pack(page, generation) for page, generation in refs)
        self._connection.settimeout(wire.left(deadline))
        self._connection.sendall(head + body)
        self._check_reply(deadline)
        for start in range(0, len(into), self._window.most):
            batch = into[start : start + self._window.most]
            for room in self._window.room(batch):
                wire.receive(self._connection, room, deadline)
            self._window.put(batch, after)
        generations = bytearray(len(refs) * wire.GENERATION_BYTES)
        wire.receive(self._connection, memoryview(generations), deadline)
        found: list[int] = np.frombuffer(generations, "<u8").tolist()
        return found

    def _check_reply(self, deadline: float) -> None:
        reply = bytearray(wire.REPLY.size)
        wire.receive(self._connection, memoryview(reply), deadline)
        magic, status = wire.REPLY.unpack(reply)
        if magic != wire.MAGIC or status not in (wire.OK, wire.STALE):
            raise errors.WorkerLost(f"{self._address} is not this life of the worker", stage=STAGE)
        if status == wire.STALE:
            raise errors.StalePage(f"{self._address}: a page was freed before it was asked for", stage=STAGE)

    def wake(self) -> None:
        """A copy that runs in another thread ends, with an error."""
        wire.shut(self._connection)

    def close(self) -> None:
        self._connection.close()

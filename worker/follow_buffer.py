"""What a follower has not heard yet."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Collection

from kvstore.sealed_page import SealedPage
from protos.v1 import worker_pb2

_AT_ONCE = 256  # pages in a message
log = logging.getLogger(__name__)


class FollowBuffer:
    """Between the worker's loop, which puts pages in, and a follower's stream, which takes them.

    A follower that reads too slowly misses the oldest pages: they are the likeliest to be gone by now.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int) -> None:
        """Holds up to `most` pages. `loop` is the stream's."""
        self.closed = False
        self.missed = 0  # pages that were never told
        self._loop = loop
        self._lock = threading.Lock()
        self._pages: deque[SealedPage] = deque(maxlen=most)
        self._ready = asyncio.Event()

    def put(self, pages: Collection[SealedPage]) -> None:
        """Add pages; callable from any thread while the loop runs."""
        if self.closed or not pages:
            return
        with self._lock:
            waiting = len(self._pages)
            self._pages.extend(pages)
            self._miss(waiting + len(pages) - len(self._pages))
        if not waiting:
            self._loop.call_soon_threadsafe(self._ready.set)

    def close(self) -> None:
        """The follower has hung up."""
        self.closed = True
        self._ready.set()

    async def take(self) -> worker_pb2.SealedPages | None:
        """The next pages, as soon as there are any; None once it is closed."""
        while not self.closed:
            await self._ready.wait()
            with self._lock:
                pages = [self._pages.popleft() for _ in range(min(_AT_ONCE, len(self._pages)))]
                if not self._pages:
                    self._ready.clear()
            if pages:
                return worker_pb2.SealedPages(pages=[page.to_proto() for page in pages])
        return None

    def _miss(self, count: int) -> None:
        if count and not self.missed:
            log.warning("a follower reads too slowly and misses pages")
        self.missed += count

"""Who wants to hear of every page that this worker seals."""

from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.pool import PagePool
from kvstore.sealed_page import SealedPage
from worker.follow_buffer import FollowBuffer


class Followers:
    """Lives in the loop's thread, as the pool does.

    A page's parent is indexed before it and leaves after it, so followers hear of every page behind its parent. On a
    GPU too a page is sealed only when its bytes are there: the scheduler seals what the host has read the results of.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._held: dict[PageKey, SealedPage] = {}  # in the order of their sealing
        self._buffers: list[FollowBuffer] = []

    @property
    def most_pages(self) -> int:
        """That can be held at a time, and so are worth telling."""
        return self._pool.total_pages

    def join(self, buffer: FollowBuffer) -> None:
        """Tell what is held now, and from now on what is sealed, until the buffer is closed."""
        self._buffers = [other for other in self._buffers if not other.closed]
        self._buffers.append(buffer)
        buffer.put(self._held.values())

    def sealed(self, page: Lineage) -> None:
        """The pool has indexed this page."""
        [number] = self._pool.match([page.key])
        told = SealedPage(page, number, self._pool.generation(number))
        self._held[page.key] = told
        for buffer in self._buffers:
            buffer.put([told])

    def evicted(self, key: PageKey) -> None:
        """The page has left the pool's index. Who heard of it finds another generation there."""
        self._held.pop(key, None)

"""Which unread page leaves the pool first. Pure policy: no clock but the count of pages that were let go."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator

from kvstore.keys import PageKey
from kvstore.page_state import PageId


class EvictionPolicy(ABC):
    """Keeps the pool's evictable pages: sealed, indexed, read by nobody.

    The pool adds a sequence's pages tail first, and a policy gives back children before their parents, for a page
    whose parent is gone can never be found again. Every call is O(1).
    """

    @abstractmethod
    def add(self, page: PageId, key: PageKey) -> None:
        """The page's last reader has left it."""

    @abstractmethod
    def take(self, page: PageId) -> None:
        """The page is read again."""

    @abstractmethod
    def evict(self) -> PageId:
        """Choose the page whose room is worth least, and forget it. There must be one."""

    @abstractmethod
    def give_up(self, page: PageId) -> None:
        """Forget this page as if it had been chosen."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[PageId]: ...


class LeastRecentlyUsed(EvictionPolicy):
    """The page that was let go longest ago."""

    def __init__(self) -> None:
        # Oldest first. A plain dict would find its first entry in O(deleted).
        self._pages: OrderedDict[PageId, None] = OrderedDict()

    def add(self, page: PageId, key: PageKey) -> None:
        self._pages[page] = None

    def take(self, page: PageId) -> None:
        del self._pages[page]

    def evict(self) -> PageId:
        return self._pages.popitem(last=False)[0]

    def give_up(self, page: PageId) -> None:
        del self._pages[page]

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[PageId]:
        return iter(self._pages)

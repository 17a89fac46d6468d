"""Which pages are on the disk, and which of them leaves next: names only, no files."""

from collections.abc import Iterator

from kvstore.keys import PageKey
from kvstore.page_state import PageId
from kvstore.reuse_rate import ReuseRate


class DiskIndex:
    """Room for `capacity` pages (0: there is no disk), by the policy of the pools.

    The numbers that it gives to pages are for the policy alone: they mean no place on the disk.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._numbers: dict[PageKey, PageId] = {}
        self._keys: dict[PageId, PageKey] = {}
        self._unused: list[PageId] = []
        self._policy = ReuseRate(max(1, capacity))

    def __contains__(self, key: PageKey) -> bool:
        return key in self._numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[PageKey]:
        return iter(self._numbers)

    def add(self, key: PageKey) -> None:
        """The page is there now. Of a prompt add the tail first, as everywhere."""
        number = self._unused.pop() if self._unused else PageId(len(self._numbers))
        self._numbers[key] = number
        self._keys[number] = key
        self._policy.add(number, key)

    def use(self, key: PageKey) -> None:
        """It was wanted again."""
        number = self._numbers[key]
        self._policy.take(number)
        self._policy.add(number, key)

    def discard(self, key: PageKey) -> None:
        """It is not there any more."""
        self._policy.take(self._numbers[key])
        self._forget(key)

    def make_room(self) -> list[PageKey]:
        """Forget as many pages as are too many for one more; they are returned."""
        leaving: list[PageKey] = []
        while len(self._numbers) >= self.capacity:
            key = self._keys[self._policy.evict()]
            self._forget(key)
            leaving.append(key)
        return leaving

    def _forget(self, key: PageKey) -> None:
        number = self._numbers.pop(key)
        del self._keys[number]
        self._unused.append(number)

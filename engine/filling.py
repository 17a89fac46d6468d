"""Which pages are being computed or fetched, so that nobody does it a second time."""

from collections.abc import Iterable

from engine.sequence import Sequence
from kvstore.keys import PageKey


class Filling:
    """The keys that admitted sequences are about to seal, and by whom.

    Who waits for one of them waits for a sequence that was admitted, and those wait for none that was not: so nobody
    waits in a circle. A key leaves when its page is sealed or its sequence ends, whichever is first.
    """

    def __init__(self) -> None:
        self._by: dict[PageKey, Sequence] = {}

    def begin(self, sequence: Sequence) -> None:
        """It has been admitted, and fills those of its known pages that it does not have. Of two, the first counts."""
        for key in sequence.keys[len(sequence.pages) :]:
            self._by.setdefault(key, sequence)

    def sealed(self, sequence: Sequence, key: PageKey) -> None:
        if self._by.get(key) is sequence:
            del self._by[key]

    def end(self, sequence: Sequence) -> None:
        """It seals nothing more. Nothing happens for one that never began."""
        for key in sequence.keys[sequence.sealed :]:
            self.sealed(sequence, key)

    def __contains__(self, key: PageKey | None) -> bool:
        return key in self._by

    def last_of_run(self, keys: Iterable[PageKey]) -> PageKey | None:
        """The last key of the leading run that is being filled; None where the first one is not."""
        last = None
        for key in keys:
            if key not in self._by:
                break
            last = key
        return last

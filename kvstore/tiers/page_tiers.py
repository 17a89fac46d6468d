"""The pages of one store: host memory that others can read, and a disk behind it."""

from collections.abc import Callable, Sequence

from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.sealed_page import SealedPage
from kvstore.segment import Segment
from kvstore.tiers.demoter import Demoter
from kvstore.tiers.ledger import Ledger
from kvstore.tiers.page_files import PageFiles
from kvstore.tiers.promoter import Promoter


class PageTiers:
    """Puts the parts together. Whoever brings pages fills what `ledger.reserve` gives, in the segment."""

    def __init__(
        self,
        segment: Segment,
        files: PageFiles | None,
        disk_bytes: int,
        on_arrive: Callable[[Lineage], None],
        on_leave: Callable[[PageKey], None],
    ) -> None:
        """`on_arrive` and `on_leave` are as the ledger has them. Takes over `files`, and not the segment."""
        disk_pages = disk_bytes // files.file_bytes if files is not None else 0
        self.segment = segment
        self.ledger = Ledger(segment.num_pages, segment.generations.data, disk_pages, on_arrive, on_leave)
        self._files = files
        self._demoter = Demoter(self.ledger, segment, files if disk_pages else None)
        self._promoter = Promoter(self.ledger, segment, files)

    def start(self) -> None:
        """Look for what is on the disk from before, and keep the tiers going. Returns at once."""
        self._demoter.start()

    def locate(self, keys: Sequence[PageKey], timeout_s: float) -> list[SealedPage]:
        """See `Promoter.locate`."""
        return self._promoter.locate(keys, timeout_s)

    def close(self) -> None:
        """End what runs. What is on the disk stays; nothing is to be filled any more."""
        self._demoter.stop()
        self._promoter.close()
        if self._files is not None:
            self._files.close()

"""How many pages of a pool one tenant may have."""

from collections import OrderedDict

from kvstore.page_state import PageId
from protos import errors


class OutOfPages(errors.Overloaded):
    """Fewer pages are available than were asked for; nothing was taken."""


class OverQuota(OutOfPages):
    """The pool may have room, but the tenant has had its share. Others need not wait for it."""


class Quota:
    """One tenant's share of one pool: at most `limit` pages, be they promised, written, read or kept for later.

    The pool counts. A tenant that has its share gives up what it let go longest ago for each new page.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pages = 0  # that are not free
        self.promised = 0
        self.unread: OrderedDict[PageId, None] = OrderedDict()  # of `pages`; oldest first

    @property
    def available(self) -> int:
        """Pages that can still be promised; below 0 where the limit was lowered."""
        return self.limit - self.promised - self.pages + len(self.unread)

    def need(self, n: int) -> None:
        """Raise `OverQuota` where `n` pages more are too many."""
        if n > self.available:
            raise OverQuota(f"{n} pages are needed, {self.available} of the tenant's {self.limit} are available")

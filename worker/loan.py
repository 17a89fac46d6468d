"""Free pages that are kept free, for a test of transports."""

from kvstore.pool import PageId, PagePool
from protos.errors import InvalidRequest
from protos.v1 import worker_pb2

MOST_LENT = 1024  # pages
LOAN_S = 120.0  # time enough for one test


class Loan:
    """Lives in the loop's thread. Nobody reads the pages' bytes: what a test copies out of them is thrown away."""

    def __init__(self) -> None:
        self._pool: PagePool | None = None
        self.pages: list[PageId] = []

    def take(self, pool: PagePool, count: int) -> list[worker_pb2.PageRef]:
        """What a reader on another worker needs to name the pages. Raises `OutOfPages`."""
        credit = pool.promise(count)
        self._pool = pool
        self.pages = [credit.take() for _ in range(count)]
        for page in self.pages:
            pool.begin_fill(page)
        return [
            worker_pb2.PageRef(index=index, page=page, generation=pool.generation(page))
            for index, page in enumerate(self.pages)
        ]

    def give_back(self) -> None:
        """May be called again, and before `take`."""
        if self._pool is not None:
            for page in self.pages:
                self._pool.abandon(page)
        self._pool = None


def check_pages(count: int) -> None:
    """Raise `InvalidRequest` for what no test needs."""
    if not 1 <= count <= MOST_LENT:
        raise InvalidRequest(f"pages must be 1 to {MOST_LENT}", field="pages", stage="measure")

"""How fast pages come from another pool: pulls of one page, and of many at once."""

from collections.abc import Callable, Sequence
from statistics import median

from kvstore.pool import PagePool
from protos.errors import DiptychError
from protos.v1 import worker_pb2
from worker.loan import Loan
from worker.puller import Pulled, Puller

_PULLS = 5  # of each size; before them one that connects
_PULL_S = 10.0


class Measurement:
    """One test of one source; `done` is called once, in the engine's thread, with the result or what went wrong."""

    def __init__(
        self, pool: PagePool, puller: Puller, done: Callable[[worker_pb2.MeasureResponse | DiptychError], None]
    ) -> None:
        self._pool = pool
        self._puller = puller
        self._done = done
        self._loan = Loan()
        self._pulls: list[Pulled] = []

    def start(self, source: worker_pb2.PageSource, refs: Sequence[worker_pb2.PageRef]) -> None:
        """Ask for every pull at once: those of one source run in order, one at a time. Raises `OutOfPages`."""
        self._loan.take(self._pool, len(refs))
        for count in [1] + [1] * _PULLS + [len(refs)] * _PULLS:
            self._puller.pull(source, refs[:count], self._loan.pages[:count], _PULL_S, self._pulled)

    def _pulled(self, pulled: Pulled) -> None:
        self._pulls.append(pulled)
        if len(self._pulls) < 1 + 2 * _PULLS:
            return
        self._loan.give_back()
        failed = next((pull.error for pull in self._pulls if pull.error is not None), None)
        self._done(failed or self._result())

    def _result(self) -> worker_pb2.MeasureResponse:
        one, many = self._pulls[1 : 1 + _PULLS], self._pulls[1 + _PULLS :]
        return worker_pb2.MeasureResponse(
            transport=many[-1].transport,
            passed_over=many[-1].passed_over,
            page_ms=median(pull.ms for pull in one),
            pull_ms=median(pull.ms for pull in many),
            bytes=many[-1].bytes,
        )

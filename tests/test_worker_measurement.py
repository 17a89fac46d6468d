"""What a measurement makes of its pulls, and that its pages come back however they end."""

from kvstore.pool import PagePool
from protos.errors import StalePage
from protos.v1 import worker_pb2
from worker.measurement import Measurement
from worker.puller import Pulled

SOURCE = worker_pb2.PageSource(worker_id="p")
REFS = [worker_pb2.PageRef(index=i, page=50 + i) for i in range(4)]


class ScriptedPuller:
    def __init__(self) -> None:
        self.pulls: list = []

    def pull(self, source, refs, into, timeout_s, done) -> None:
        assert source is SOURCE
        self.pulls.append((list(refs), list(into), done))


def start() -> tuple[PagePool, ScriptedPuller, list]:
    pool, puller, results = PagePool(8), ScriptedPuller(), []
    Measurement(pool, puller, results.append).start(SOURCE, REFS)
    return pool, puller, results


def test_the_medians_leave_out_the_pull_that_connects():
    pool, puller, results = start()
    assert [len(refs) for refs, _, _ in puller.pulls] == [1] * 6 + [4] * 5
    assert pool.held_pages == 4
    for (refs, into, done), ms in zip(puller.pulls, [500, 1, 2, 9, 3, 4, 50, 20, 30, 10, 40], strict=True):
        assert len(set(into)) == len(refs)
        assert not results
        done(Pulled(len(refs), 100 * len(refs), ms, "tcp", passed_over="shm: other host"))
    assert results == [
        worker_pb2.MeasureResponse(transport="tcp", passed_over="shm: other host", page_ms=3, pull_ms=30, bytes=400)
    ]
    assert pool.held_pages == 0


def test_an_error_is_the_result_but_only_when_nothing_writes_any_more():
    pool, puller, results = start()
    *pulls, last = [done for _, _, done in puller.pulls]
    first = StalePage("first")
    pulls[0](Pulled(1, error=first))
    for done in pulls[1:]:
        done(Pulled(1, error=StalePage("later")))
    assert not results
    assert pool.held_pages == 4
    last(Pulled(4))
    assert results == [first]
    assert pool.held_pages == 0

"""Pages that are lent for a test come back, also from a caller that forgets them."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace

from kvstore.pool import PagePool
from protos.v1 import worker_pb2
from worker.service import WorkerService


class Loop:
    """Does at once what it is asked for."""

    def __init__(self, pool: PagePool) -> None:
        self._role = SimpleNamespace(pool=pool)

    def ask(self, act) -> Future:
        done: Future = Future()
        done.set_result(act(self._role))
        return done

    def post(self, act) -> None:
        act()


async def test_a_loan_ends_when_its_caller_forgets_it(monkeypatch):
    monkeypatch.setattr("worker.service.LOAN_S", 0.05)
    pool, ends = PagePool(8), []
    service = WorkerService(Loop(pool), None, worker_pb2.WorkerDescription, lambda: None)
    context = SimpleNamespace(add_done_callback=ends.append)
    async with asyncio.timeout(10):
        loans = [loan async for loan in service.Lend(worker_pb2.LendRequest(pages=3), context)]
    assert [len(loan.pages) for loan in loans] == [3]
    assert pool.held_pages == 3
    ends[0](None)  # the call is over, as gRPC says then
    assert pool.held_pages == 0

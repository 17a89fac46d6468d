"""Tests of transports with a page store at one end, and that its pages come back however they end."""

import asyncio
from types import SimpleNamespace

import grpc.aio
import pytest
import pytest_asyncio

from kvstore.pool import PagePool
from kvstore.segment import Segment
from kvstore.tiers.page_tiers import PageTiers
from kvstore.transports import registry
from kvstore_owner import SMALL
from page_store.operator_service import StoreService
from protos import errors
from protos.v1 import page_store_pb2_grpc, worker_pb2
from router_rig import until
from rpc.server import start_server
from worker.loan import Loan

PAGES = 8
LIFE = 5


class Store:
    """A page store's memory and operator service, without the workers that it would follow."""

    def __init__(self) -> None:
        self.segment = Segment.create(SMALL, PAGES, LIFE)
        self.tiers = PageTiers(self.segment, None, 0, lambda _: None, lambda _: None)
        self.shelf: SimpleNamespace | None = SimpleNamespace(tiers=self.tiers, record=self.record)

    @property
    def spare(self) -> int:
        return self.tiers.ledger._pool.available_pages

    @staticmethod
    def record() -> SimpleNamespace:
        return SimpleNamespace(source=worker_pb2.PageSource(worker_id="s", incarnation=LIFE, format=SMALL.to_proto()))

    def pages(self) -> SimpleNamespace:
        if self.shelf is None:
            raise errors.NoWorkers("nobody yet")
        return self.shelf

    def close(self) -> None:
        self.tiers.close()
        self.segment.close()


@pytest_asyncio.fixture
async def store():
    store = Store()
    yield store
    await until(lambda: store.spare == PAGES, instead=lambda: store.spare)
    store.close()


@pytest_asyncio.fixture
async def stub(store):
    service = StoreService(lambda: None, store.pages, ("shm", "tcp"))
    server = await start_server(
        lambda server: page_store_pb2_grpc.add_PageStoreServicer_to_server(service, server), [], "127.0.0.1", 0
    )
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield page_store_pb2_grpc.PageStoreStub(channel)
    await server.stop()
    await service.aclose()


@pytest.fixture
def worker():
    """Another pool, with three pages lent: what a store is asked to pull."""
    segment = Segment.create(SMALL, 4, LIFE)
    servers = registry.serve(("shm",), segment, "127.0.0.1")
    loan = Loan()
    refs = loan.take(PagePool(4, segment.generations), 3)
    source = worker_pb2.PageSource(worker_id="w", incarnation=LIFE, format=SMALL.to_proto())
    source.endpoints.add(transport=servers[0].endpoint.transport, address=servers[0].endpoint.address)
    yield SimpleNamespace(segment=segment, loan=loan, request=worker_pb2.MeasureRequest(source=source, pages=refs))
    for server in servers:
        server.close()
    segment.close()


async def test_what_a_store_lends_is_held_until_the_caller_hangs_up(store, stub):
    call = stub.Lend(worker_pb2.LendRequest(pages=4))
    loan = await anext(aiter(call))
    assert loan.source.worker_id == "s"
    assert len({ref.page for ref in loan.pages}) == 4
    assert store.spare == 4
    call.cancel()
    await until(lambda: store.spare == PAGES)
    assert all(store.segment.generations[ref.page] == ref.generation + 1 for ref in loan.pages)


@pytest.mark.parametrize(
    ("pages", "code"),
    [
        (0, grpc.StatusCode.INVALID_ARGUMENT),
        (1025, grpc.StatusCode.INVALID_ARGUMENT),
        (PAGES // 2 + 1, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_half_of_the_room_is_never_lent(stub, pages, code):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(stub.Lend(worker_pb2.LendRequest(pages=pages))))
    assert caught.value.code() is code


async def test_all_that_is_lent_has_a_bound(stub, monkeypatch):
    monkeypatch.setattr("page_store.operator_service.MOST_LENT", 3)
    first = stub.Lend(worker_pb2.LendRequest(pages=2))
    await anext(aiter(first))
    with pytest.raises(grpc.aio.AioRpcError, match="2 pages are lent already"):
        await anext(aiter(stub.Lend(worker_pb2.LendRequest(pages=2))))
    first.cancel()


async def test_a_loan_ends_when_its_caller_forgets_it(store, stub, monkeypatch):
    monkeypatch.setattr("page_store.operator_service.LOAN_S", 0.05)
    assert [len(loan.pages) async for loan in stub.Lend(worker_pb2.LendRequest(pages=2))] == [2]
    await until(lambda: store.spare == PAGES)


async def test_a_store_without_pages_says_so(store, stub, worker):
    store.shelf = None
    for call in (anext(aiter(stub.Lend(worker_pb2.LendRequest(pages=1)))), stub.Measure(worker.request)):
        with pytest.raises(grpc.aio.AioRpcError, match="nobody yet"):
            await call


async def test_the_way_into_a_store_is_measured(store, stub, worker):
    found = await stub.Measure(worker.request)
    assert (found.transport, found.passed_over, found.bytes) == ("shm", "", 3 * SMALL.page_bytes)
    assert found.page_ms > 0
    assert found.pull_ms > 0
    assert store.spare == PAGES


async def test_pages_that_are_not_lent_any_more_are_not_measured(store, stub, worker):
    worker.loan.give_back()
    with pytest.raises(grpc.aio.AioRpcError, match="freed"):
        await stub.Measure(worker.request)
    assert store.spare == PAGES


async def test_one_test_at_a_time(stub, worker, monkeypatch):
    go = asyncio.Event()
    loop = asyncio.get_running_loop()

    def measure(*_: object) -> worker_pb2.MeasureResponse:
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(10)
        return worker_pb2.MeasureResponse(bytes=1)

    monkeypatch.setattr("page_store.operator_service.measure", measure)
    first, second = (asyncio.ensure_future(stub.Measure(worker.request)) for _ in range(2))
    done, _ = await asyncio.wait({first, second}, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    [refused] = done
    assert "runs already" in str(refused.exception())
    go.set()
    [answered] = {first, second} - done
    assert (await answered).bytes == 1

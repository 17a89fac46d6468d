"""A page store between a directory and workers: whom it follows, what it says of itself, what it refuses."""

import asyncio
import threading
import time
from dataclasses import replace

import grpc.aio
import pytest
import pytest_asyncio

from kvstore.directory import STORE_POOL, WorkerRecord
from kvstore.keys import PageKey, pack_keys
from kvstore.lineage import Lineage
from kvstore.page_state import PageId
from kvstore.redis_directory import RedisDirectoryReader, RedisDirectoryWriter
from kvstore.sealed_page import SealedPage
from kvstore.segment import Segment
from kvstore.transports import registry
from kvstore.valkey import EmbeddedValkey
from kvstore_owner import INCARNATION, SMALL, Owner, random_page
from page_store import service
from page_store.config import PageStoreConfig
from page_store.service import HolderService
from page_store.store import PageStore
from protos import errors
from protos.v1 import page_store_pb2_grpc, worker_pb2, worker_pb2_grpc
from rpc import status
from rpc.server import start_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEYS = [PageKey(bytes([number]) * 16) for number in range(1, 9)]
PATIENCE_S = 20.0


class FollowedWorker(worker_pb2_grpc.WorkerServicer):
    """Answers `Follow` alone, with the pages of an owner."""

    def __init__(self, owner: Owner, writer: RedisDirectoryWriter) -> None:
        refs = owner.fill_random(*range(len(KEYS)))
        lineages = [Lineage(key, KEYS[0], KEYS[i - 1] if i else None) for i, key in enumerate(KEYS)]
        self.pages = [SealedPage(one, PageId(page), gen) for one, (page, gen) in zip(lineages, refs, strict=True)]
        self.streams = 0
        endpoints = tuple(owner.endpoints.items())
        self.record = WorkerRecord("w-0", INCARNATION, "prefill", "", "model", "weights", SMALL, 1000, endpoints)
        self._writer = writer

    async def start(self) -> None:
        register = lambda server: worker_pb2_grpc.add_WorkerServicer_to_server(self, server)  # noqa: E731
        self._server = await start_server(register, [], "127.0.0.1", 0)
        self.record = replace(self.record, address=self._server.address)

    async def stop(self) -> None:
        await self._server.stop(grace_s=0)

    def list(self, **changes) -> None:
        self._writer.renew(replace(self.record, **changes), 3600)

    async def Follow(self, request, context):
        self.streams += 1
        yield worker_pb2.SealedPages(pages=[page.to_proto() for page in self.pages])
        await asyncio.Event().wait()


@pytest.fixture(scope="module")
def valkey():
    with EmbeddedValkey() as valkey:
        yield valkey


@pytest.fixture(scope="module")
def owner():
    with Owner(num_pages=len(KEYS)) as owner:
        yield owner


@pytest_asyncio.fixture(loop_scope="module")
async def world(valkey, owner, request):
    """A store, a worker that is not listed yet, and the directory; of another cluster in each test."""
    cluster = f"{request.node.name}-{time.monotonic_ns()}"
    writer = RedisDirectoryWriter(valkey.url, cluster)
    worker = FollowedWorker(owner, writer)
    await worker.start()
    store = await PageStore.start(
        PageStoreConfig("store-0", valkey.url, 16 * SMALL.page_bytes, cluster, transports=("shm", "tcp"))
    )
    reader = RedisDirectoryReader(valkey.url, cluster)
    yield store, worker, reader
    await store.stop()
    await worker.stop()
    await reader.aclose()
    owner.reset()
    writer.close()


async def eventually(check) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def following(store: PageStore, *names: str) -> None:
    async def check() -> bool:
        return list(store.describe().following) == list(names)

    await eventually(check)


async def arrived(store: PageStore) -> None:
    async def check() -> bool:
        return store.describe().counters.arrived == len(KEYS)

    await eventually(check)


async def locate(store: PageStore, keys: bytes) -> list[worker_pb2.PageRef]:
    async with grpc.aio.insecure_channel(store.address) as channel:
        stub = worker_pb2_grpc.PageHolderStub(channel)
        return list((await stub.Locate(worker_pb2.LocateRequest(page_keys=keys), timeout=10)).pages)


async def test_it_registers_with_its_first_worker_and_tells_what_it_holds(world):
    store, worker, reader = world
    assert await reader.workers() == []
    assert not store.describe().HasField("source")
    assert await locate(store, pack_keys(KEYS)) == []
    worker.list()
    await arrived(store)

    async def found() -> bool:
        return await reader.lookup(KEYS) == {f"store-0/{store.incarnation}": len(KEYS)}

    await eventually(found)
    [record] = [record for record in await reader.workers() if record.pool == STORE_POOL]
    assert (record.worker_id, record.address, record.format) == ("store-0", store.address, SMALL)
    async with grpc.aio.insecure_channel(store.address) as channel:
        told = await page_store_pb2_grpc.PageStoreStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=10)
    assert (told.store_id, list(told.following)) == ("store-0", ["w-0"])
    assert (told.host.total_pages, told.host.pages, told.disk.total_pages) == (16, len(KEYS), 0)
    assert told.source == record.source


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_what_it_located_can_be_pulled_from_it(world, transport):
    store, worker, _ = world
    worker.list()
    await arrived(store)
    refs = await locate(store, pack_keys([*KEYS, PageKey(bytes(16))]))
    assert [ref.index for ref in refs] == list(range(len(KEYS)))
    local = Segment.create(SMALL, len(KEYS), incarnation=1)
    reader = registry.connect(store.describe().source, local, [transport])
    reader.pull([(ref.page, ref.generation) for ref in refs], list(range(len(KEYS))), PATIENCE_S)
    for seed in range(len(KEYS)):
        assert (local.pages[seed] == random_page(seed, SMALL)).all()
    reader.close()
    local.close()


async def test_workers_of_other_hosts_and_other_stores_are_not_followed(world):
    store, worker, _ = world
    worker.list(worker_id="far", address="127.0.0.9:1")
    worker.list(worker_id="another", pool=STORE_POOL)
    worker.list()
    await arrived(store)
    assert list(store.describe().following) == ["w-0"]
    assert worker.streams == 1


async def test_a_worker_of_another_page_format_is_refused_once_by_the_difference(world, caplog):
    store, worker, _ = world
    worker.list()
    await following(store, "w-0")
    worker.list(worker_id="w-1", format=replace(SMALL, page_size=32))

    async def refused() -> bool:
        return "w-1 is not followed" in caplog.text

    await eventually(refused)
    worker.list(worker_id="w-2")
    await following(store, "w-0", "w-2")  # after another look into the directory
    assert caplog.text.count("w-1 is not followed: page formats differ") == 1
    assert "page_size 16 against 32" in caplog.text


async def test_a_worker_that_is_not_listed_any_more_is_let_go_and_its_pages_stay(world):
    store, worker, _ = world
    worker.list()
    await arrived(store)
    worker._writer.deregister("w-0", INCARNATION)
    await following(store)
    assert len(await locate(store, pack_keys(KEYS))) == len(KEYS)
    worker.list()
    await following(store, "w-0")
    assert store.describe().counters.arrived == len(KEYS)  # none of them came again


async def test_a_stream_that_breaks_is_opened_again(world):
    store, worker, _ = world
    worker.list()
    await arrived(store)
    port = int(worker._server.address.rpartition(":")[2])
    await worker.stop()
    worker._server = await start_server(
        lambda server: worker_pb2_grpc.add_WorkerServicer_to_server(worker, server), [], "127.0.0.1", port
    )

    async def again() -> bool:
        return worker.streams == 2

    await eventually(again)


async def test_keys_that_are_none_are_refused_by_name(world):
    store, _, _ = world
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await locate(store, bytes(17))
    error = status.from_rpc_error(caught.value)
    assert isinstance(error, errors.InvalidRequest)
    assert error.field == "page_keys"


async def test_callers_that_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(service, "_MOST_WAITING", 2)
    enough = threading.Event()

    def slow(keys, timeout_s):
        enough.wait(PATIENCE_S)
        return []

    holder = HolderService(slow)
    waiting = [asyncio.create_task(holder._find([], 1.0)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(errors.Overloaded):
        await holder._find([], 1.0)
    enough.set()
    assert await asyncio.gather(*waiting) == [[], []]
    assert await holder._find([], 1.0) == []
    await holder.aclose()


async def test_a_directory_that_does_not_answer_is_an_error_of_the_start(tmp_path):
    with pytest.raises(errors.MetadataUnavailable):
        await PageStore.start(PageStoreConfig("store-0", f"unix://{tmp_path}/none", 1 << 20))


async def test_memory_for_less_than_a_page_is_told(world, valkey, caplog):
    _, worker, reader = world
    cluster = worker._writer._keys._cluster
    small = await PageStore.start(PageStoreConfig("store-1", valkey.url, 100, cluster))
    worker.list()

    async def told() -> bool:
        return "a page has 4096 bytes, and the page store may take 100" in caplog.text

    await eventually(told)
    assert list(small.describe().following) == []
    await small.stop()
    assert "store-1" not in {record.worker_id for record in await reader.workers()}

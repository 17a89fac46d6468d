"""Page stores on real processes: what a worker has sealed outlives it, and what is on the disk outlives the store."""

import asyncio
import random
import time

import grpc.aio
import pytest
import pytest_asyncio
import torch

from engine.config import EngineConfig
from kvstore.keys import PageKey, pack_keys, page_keys
from kvstore.page_format import PageFormat
from kvstore.redis_directory import RedisDirectoryReader
from kvstore.segment import Segment
from kvstore.transports import registry
from protos.v1 import page_store_pb2, page_store_pb2_grpc, worker_pb2, worker_pb2_grpc
from router.served_model import ServedModel
from stack import Service, Stack
from tiny_model import make_tiny_model
from worker.page_checksums import PageChecksums

pytestmark = pytest.mark.asyncio(loop_scope="module")
ENGINE = EngineConfig(page_size=16, num_pages=200, token_budget=64, max_sequences=8, dtype="float32")
PROMPT = random.Random(3).choices(range(3, 250), k=600)
PAGES = 37
ANSWER = {"max_tokens": 12, "ignore_eos": True}
PATIENCE_S = 30.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory):
    async with Stack(make_tiny_model(tmp_path_factory.mktemp("model")), 1, 1, ENGINE, verify="checksum") as stack:
        stack.disk_dir = tmp_path_factory.mktemp("disk")
        stack.store = await start_store(stack)
        try:
            yield stack
        finally:
            await stack.store.stop()


async def start_store(stack: Stack) -> Service:
    settings = {
        "store_id": "store-0",
        "redis_url": stack.valkey.url,
        "host_bytes": 64 << 20,
        "disk_dir": str(stack.disk_dir),
        "disk_bytes": 64 << 20,
        "transports": ("shm", "tcp"),
    }
    return await stack.spawn("store", settings)


async def describe(store: Service) -> page_store_pb2.PageStoreDescription:
    async with grpc.aio.insecure_channel(store.address) as channel:
        return await page_store_pb2_grpc.PageStoreStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=10)


async def eventually(check) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def keys_of(stack: Stack) -> list[PageKey]:
    """Of the prompt's full pages."""
    description = (await stack.descriptions())[0]
    identity = description.fingerprint, PageFormat.from_proto(description.source.format)
    return page_keys(ServedModel.load("tiny", stack.model).root_key("", identity), PROMPT, ENGINE.page_size)


async def pull(address: str, source: worker_pb2.PageSource, keys: list[PageKey], transport: str) -> list[bytes]:
    """The leading run of these pages that the holder at this address has; each is as its checksum says."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = worker_pb2.LocateRequest(page_keys=pack_keys(keys))
        refs = (await worker_pb2_grpc.PageHolderStub(channel).Locate(request, timeout=10)).pages
    local = Segment.create(PageFormat.from_proto(source.format), len(keys), incarnation=1)
    reader = registry.connect(source, local, [transport])
    try:
        reader.pull([(ref.page, ref.generation) for ref in refs], list(range(len(refs))), 10)
        checksums = PageChecksums(torch.as_tensor(local.pages)).of(range(len(refs)))
        assert [ref.checksum for ref in refs] == checksums
        return [local.pages[index].tobytes() for index in range(len(refs))]
    finally:
        reader.close()
        local.close()


async def test_pages_outlive_their_worker_and_its_successor_fetches_them(stack):
    """Held bit for bit, found by the router's lookup, and of use to the next worker."""
    before = await stack.client.complete(token_ids=PROMPT, **ANSWER)
    keys = await keys_of(stack)
    directory = RedisDirectoryReader(stack.valkey.url, "diptych")
    store = f"store-0/{(await describe(stack.store)).incarnation}"

    async def found() -> bool:
        return (await directory.lookup(keys)).get(store) == PAGES

    await eventually(found)
    await directory.aclose()
    [prefill] = [d for d in await stack.descriptions() if d.pool == "prefill"]
    stack.pages = await pull(stack.prefill[0].address, prefill.source, keys, "shm")
    assert len(stack.pages) == PAGES
    assert len(set(stack.pages)) == PAGES

    await stack.prefill.pop().kill()
    source = (await describe(stack.store)).source
    for transport in ("shm", "tcp"):
        assert await pull(stack.store.address, source, keys, transport) == stack.pages

    await stack.add("prefill")
    again = await stack.client.complete(token_ids=PROMPT, **ANSWER)
    assert again.stats.prefill_fetched_pages == PAGES
    assert again.token_ids == before.token_ids
    await stack.assert_nothing_held()


async def test_what_is_on_the_disk_outlives_the_store(stack):
    keys = await keys_of(stack)

    async def written() -> bool:
        told = await describe(stack.store)
        return told.disk.pages == told.counters.arrived > PAGES

    await eventually(written)
    await stack.store.kill()
    damaged = stack.disk_dir / keys[30].hex()[:2] / f"{keys[30].hex()}.page"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    for worker in (stack.prefill.pop(), stack.decode.pop()):  # nobody has the pages any more
        await worker.kill()
    stack.store, _ = await asyncio.gather(start_store(stack), stack.add("prefill"))

    async def found() -> bool:
        return (await describe(stack.store)).disk.pages > PAGES

    await eventually(found)
    told = await describe(stack.store)
    assert (told.host.pages, told.counters.arrived) == (0, 0)
    assert await pull(stack.store.address, told.source, keys, "shm") == stack.pages[:30]
    assert (await describe(stack.store)).counters.dropped_corrupt == 1

"""Where a worker's pages are, over the wire."""

import asyncio

import grpc.aio
import pytest
import pytest_asyncio

from kvstore import locate_request
from kvstore.keys import PageKey, pack_keys, page_keys
from prefill_worker.role import PrefillRole
from protos.errors import InvalidRequest
from protos.v1 import worker_pb2, worker_pb2_grpc
from role_kit import PAGE, ROOT, ScriptedPuller, make_engine
from rpc import status
from rpc.server import start_server
from worker.loop import WorkerLoop
from worker.page_holder import PageHolder

KEYS = page_keys(ROOT, list(range(4 * PAGE)), PAGE)


@pytest_asyncio.fixture
async def world():
    """A worker that holds the first, second and fourth of `KEYS`, and how to ask it."""
    role = PrefillRole(make_engine()[0], ScriptedPuller())
    pages = []
    for key in (KEYS[0], KEYS[1], KEYS[3]):
        pages.append(role.pool.promise(1).take())
        role.pool.begin_fill(pages[-1])
        role.pool.seal(pages[-1], key)
    loop = WorkerLoop(role)
    loop.start()
    server = await start_server(
        lambda server: worker_pb2_grpc.add_PageHolderServicer_to_server(PageHolder(loop), server), [], "127.0.0.1", 0
    )
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield role.pool, pages, worker_pb2_grpc.PageHolderStub(channel)
    await server.stop()
    await asyncio.to_thread(loop.stop)


async def locate(stub, keys: list[PageKey]) -> list[tuple[int, int, int]]:
    answer = await stub.Locate(worker_pb2.LocateRequest(page_keys=pack_keys(keys)), timeout=10)
    return [(ref.index, ref.page, ref.generation) for ref in answer.pages]


async def test_the_leading_run_is_named_and_nothing_is_held_for_it(world):
    pool, pages, stub = world
    before = [pool.readers(page) for page in pages]
    expected = [(index, page, pool.generation(page)) for index, page in enumerate(pages[:2])]
    assert await locate(stub, KEYS) == expected
    assert await locate(stub, KEYS[3:]) == [(0, pages[2], pool.generation(pages[2]))]
    assert await locate(stub, KEYS[2:]) == []
    assert [pool.readers(page) for page in pages] == before


async def test_what_is_no_key_or_too_much_is_refused_by_name(world, monkeypatch):
    _, _, stub = world
    monkeypatch.setattr(locate_request, "_MOST_KEYS", 3)
    for keys in (bytes(17), pack_keys(KEYS)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Locate(worker_pb2.LocateRequest(page_keys=keys), timeout=10)
        error = status.from_rpc_error(caught.value)
        assert isinstance(error, InvalidRequest)
        assert error.field == "page_keys"
    assert len(await locate(stub, KEYS[:3])) == 2

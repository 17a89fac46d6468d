"""Measuring paths between real workers; what is lent for it comes back."""

import asyncio

import grpc.aio
import pytest
import pytest_asyncio

from cluster.doctor import Path, flag_slow, measure
from engine.config import EngineConfig
from protos.v1 import worker_pb2, worker_pb2_grpc
from stack import Stack
from tiny_model import make_tiny_model

PAGES = 40


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    engine = EngineConfig(page_size=16, num_pages=PAGES, token_budget=64, max_sequences=4, dtype="float32")
    async with Stack(model, 1, 1, engine) as stack:
        yield stack


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_is_kept(stack):
    yield
    await stack.assert_nothing_held()


def ends(stack: Stack) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("p", stack.prefill[0].address), ("d", stack.decode[0].address)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_path_is_measured(stack):
    description = (await stack.descriptions())[0]
    path = await asyncio.to_thread(measure, *ends(stack))
    assert (path.source, path.reader, path.transport, path.slow, path.error) == ("p", "d", "shm", "", "")
    page = description.source.format
    page_bytes = page.layers * 2 * page.kv_heads * page.page_size * page.head_dim * 4
    assert path.pull_mib == PAGES // 2 * page_bytes / (1 << 20)  # half of what is free
    assert path.gb_per_s > 0
    assert path.page_ms > 0


@pytest.mark.asyncio(loop_scope="module")
async def test_a_path_that_does_not_work_says_why(stack):
    source, reader = ends(stack)
    nobody = ("x", "127.0.0.1:9")
    for ends_of_path in ((source, nobody), (nobody, reader)):
        path = await asyncio.to_thread(measure, *ends_of_path)
        assert path.error
        assert not path.transport
    path = await asyncio.to_thread(measure, source, source)
    assert path.error == "this worker pulls no pages"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("pages", "code"),
    [
        (0, grpc.StatusCode.INVALID_ARGUMENT),
        (1025, grpc.StatusCode.INVALID_ARGUMENT),
        (PAGES + 1, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_no_more_is_lent_than_there_is(stack, pages, code):
    async with grpc.aio.insecure_channel(stack.prefill[0].address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(worker_pb2_grpc.WorkerStub(channel).Lend(worker_pb2.LendRequest(pages=pages))))
    assert caught.value.code() is code


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_lent_is_held_until_the_caller_hangs_up(stack):
    async with grpc.aio.insecure_channel(stack.prefill[0].address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Lend(worker_pb2.LendRequest(pages=7))
        loan = await anext(aiter(call))
        assert len({ref.page for ref in loan.pages}) == 7
        assert [ref.index for ref in loan.pages] == list(range(7))
        [held] = [d.load.held_pages for d in await stack.descriptions() if d.pool == "prefill"]
        assert held == 7
        call.cancel()


@pytest.mark.asyncio(loop_scope="module")
async def test_pages_that_are_not_lent_any_more_are_not_measured(stack):
    prefill, decode = (service.address for service in (stack.prefill[0], stack.decode[0]))
    async with grpc.aio.insecure_channel(prefill) as there, grpc.aio.insecure_channel(decode) as here:
        call = worker_pb2_grpc.WorkerStub(there).Lend(worker_pb2.LendRequest(pages=3))
        loan = await anext(aiter(call))
        call.cancel()
        await stack.assert_nothing_held()
        request = worker_pb2.MeasureRequest(source=loan.source, pages=loan.pages)
        with pytest.raises(grpc.aio.AioRpcError, match="freed"):
            await worker_pb2_grpc.WorkerStub(here).Measure(request)


def test_slow_is_what_is_far_below_the_others_of_its_transport():
    paths = [
        Path("p1", "d1", "tcp", 1.0),
        Path("p2", "d1", "tcp", 1.1),
        Path("p3", "d1", "tcp", 0.4),
        Path("p1", "d2", "shm", 10.0),
        Path("p2", "d2", "tcp", 0.9, slow="shm: other host"),
        Path("p3", "d2", error="gone"),
    ]
    flagged = flag_slow(paths)
    assert [path.slow for path in flagged] == ["", "", "0.9 GB/s is usual for tcp here", "", "shm: other host", ""]
    assert flagged[5].error == "gone"


def test_slow_is_also_what_placement_does_not_count_on():
    [only] = flag_slow([Path("p1", "d1", "tcp", 0.4, pull_mib=64.0)])
    assert only.slow == "placement counts on 1.0 GB/s by tcp"
    fine = [Path("p1", "d1", "tcp", 0.6, pull_mib=64.0), Path("p1", "d2", "shm", 0.1, pull_mib=1.0)]
    assert [path.slow for path in flag_slow(fine)] == ["", ""]  # a pull of 1 MiB says nothing of a rate
    assert [path.slow for path in flag_slow([Path("p1", "d1", "nixl", 0.1, pull_mib=64.0)])] == [""]

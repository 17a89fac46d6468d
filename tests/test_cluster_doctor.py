"""Measuring paths between real workers; what is lent for it comes back."""

import asyncio

import grpc.aio
import pytest
import pytest_asyncio

from cluster.doctor import HOST_DOWN, HOST_UP, POOL_TO_POOL, End, Path, flag_slow, measure, paths_of
from engine.config import EngineConfig
from protos.v1 import operator_pb2, worker_pb2, worker_pb2_grpc
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


def ends(stack: Stack) -> tuple[End, End]:
    return End("p", stack.prefill[0].address, "prefill"), End("d", stack.decode[0].address, "decode")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_path_is_measured(stack):
    description = (await stack.descriptions())[0]
    path = await asyncio.to_thread(measure, *ends(stack))
    assert (path.source, path.reader, path.tier) == ("p", "d", POOL_TO_POOL)
    assert (path.transport, path.slow, path.error) == ("shm", "", "")
    page = description.source.format
    page_bytes = page.layers * 2 * page.kv_heads * page.page_size * page.head_dim * 4
    assert path.pull_mib == PAGES // 2 * page_bytes / (1 << 20)  # half of what is free
    assert path.gb_per_s > 0
    assert path.page_ms > 0


@pytest.mark.asyncio(loop_scope="module")
async def test_a_path_that_does_not_work_says_why(stack):
    source, reader = ends(stack)
    nobody = End("x", "127.0.0.1:9", "prefill")
    for ends_of_path in ((source, nobody), (nobody, reader)):
        path = await asyncio.to_thread(measure, *ends_of_path)
        assert path.error
        assert not path.transport


@pytest.mark.asyncio(loop_scope="module")
async def test_prefill_workers_pull_pages_too(stack):
    prefill, decode = ends(stack)
    path = await asyncio.to_thread(measure, decode, prefill)
    assert (path.source, path.reader, path.transport, path.error) == ("d", "p", "shm", "")
    assert path.gb_per_s > 0


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


def cluster_of(**pools: list[str]) -> operator_pb2.StatusResponse:
    ready = operator_pb2.WORKER_STATE_READY
    return operator_pb2.StatusResponse(
        pools=[
            operator_pb2.PoolStatus(
                pool=pool,
                workers=[operator_pb2.WorkerStatus(worker_id=a, address=f"{a[-1]}:1", state=ready) for a in ids],
            )
            for pool, ids in pools.items()
        ]
    )


def test_paths_are_those_that_pages_take():
    """Each worker's last letter is its node."""
    cluster = cluster_of(prefill=["p1a"], decode=["d1a", "d2b"], colocated=["c1b"], store=["s1a", "s2b"], router=["ra"])
    assert {f"{source.id} {reader.id}" for source, reader in paths_of(cluster)} == {
        *("p1a d1a", "p1a d2b"),
        *("d1a p1a", "d2b p1a", "c1b p1a", "p1a c1b", "d1a c1b", "d2b c1b"),
        *("s1a p1a", "s2b c1b"),
        *("p1a s1a", "d1a s1a", "d2b s2b", "c1b s2b"),
    }
    cluster.pools[1].workers[1].state = operator_pb2.WORKER_STATE_STARTING
    assert not any("d2b" in (source.id, reader.id) for source, reader in paths_of(cluster))


def test_slow_is_what_is_far_below_the_others_of_its_tier_and_transport():
    paths = [
        Path("p1", "d1", POOL_TO_POOL, "tcp", 1.0),
        Path("p2", "d1", POOL_TO_POOL, "tcp", 1.1),
        Path("p3", "d1", POOL_TO_POOL, "tcp", 0.4),
        Path("p1", "d2", POOL_TO_POOL, "shm", 10.0),
        Path("p2", "d2", POOL_TO_POOL, "tcp", 0.9, slow="shm: other host"),
        Path("p3", "d2", POOL_TO_POOL, error="gone"),
        Path("s1", "p1", HOST_UP, "shm", 4.0),
    ]
    flagged = flag_slow(paths)
    slow = ["", "", "0.9 GB/s is usual for tcp here", "", "shm: other host", "", ""]
    assert [path.slow for path in flagged] == slow
    assert flagged[5].error == "gone"


def test_slow_is_also_what_placement_does_not_count_on():
    [only] = flag_slow([Path("p1", "d1", POOL_TO_POOL, "tcp", 0.4, pull_mib=64.0)])
    assert only.slow == "placement counts on 1.0 GB/s by tcp"
    [far] = flag_slow([Path("p1", "d3", POOL_TO_POOL, "nixl", 0.1, pull_mib=64.0)])
    assert far.slow == "placement counts on 1.0 GB/s by nixl"
    [up] = flag_slow([Path("s1", "p1", HOST_UP, "shm", 1.0, pull_mib=64.0)])
    assert up.slow == "placement counts on 4.0 GB/s by shm"
    fine = [
        Path("p1", "d1", POOL_TO_POOL, "tcp", 0.6, pull_mib=64.0),
        Path("p1", "d2", POOL_TO_POOL, "shm", 0.1, pull_mib=1.0),  # this says nothing of a rate
        Path("p1", "s1", HOST_DOWN, "cuda_ipc", 25.0, pull_mib=64.0),  # over the host's link, not between GPUs
    ]
    assert [path.slow for path in flag_slow(fine)] == [""] * 3

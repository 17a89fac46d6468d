"""What can be said of GPU pools without a GPU: what is refused, and why. tests/gpu/test_cuda_ipc.py has the rest."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvstore import cuda
from kvstore.segment import Segment
from kvstore.segment_base import SegmentBase
from kvstore.segment_header import SegmentHeader
from kvstore.transports import cuda_ipc, registry, shm
from kvstore_owner import INCARNATION, SMALL
from protos import errors
from protos.v1 import worker_pb2

HANDLE = bytes(range(1, 65))
GPU = bytes(range(16))
NO_CUDA = "no GPU is visible"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    monkeypatch.setattr(cuda, "unavailable", lambda: NO_CUDA)


@pytest.fixture
def gpu_pool() -> Iterator[SegmentBase]:
    """The host part of a pool whose pages are on a GPU."""
    segment = SegmentBase._create(SegmentHeader(SMALL, 1000, INCARNATION, HANDLE, GPU))
    yield segment
    segment.close()


@pytest.fixture
def local() -> Iterator[Segment]:
    segment = Segment.create(SMALL, 2, incarnation=1)
    yield segment
    segment.close()


def test_readers_see_generations_and_the_handle(gpu_pool):
    gpu_pool.generations[999] = 2**40
    theirs = SegmentBase.open(gpu_pool.address, INCARNATION, SMALL)
    assert theirs.header.on_gpu
    assert (theirs.header.ipc_handle, theirs.header.gpu) == (HANDLE, GPU)
    assert theirs.generations[[0, 999]].tolist() == [0, 2**40]
    assert theirs.header.size < SMALL.page_bytes * 1000  # no pages in host memory
    theirs.close()


def test_an_owner_that_has_closed_its_pool_is_gone(gpu_pool):
    theirs = SegmentBase.open(gpu_pool.address, INCARNATION, SMALL)
    assert theirs.owner_alive()
    gpu_pool.close()
    assert not theirs.owner_alive()
    theirs.close()
    assert not theirs.owner_alive()


def test_another_life_and_another_format_are_refused(gpu_pool):
    with pytest.raises(errors.WorkerLost, match="another life"):
        SegmentBase.open(gpu_pool.address, INCARNATION + 1, SMALL)
    with pytest.raises(errors.FormatMismatch, match="head_dim 16 against 8"):
        SegmentBase.open(gpu_pool.address, INCARNATION, replace(SMALL, head_dim=16))


@pytest.mark.parametrize(
    ("at", "value"), [(24, bytes(8)), (40, bytes(4)), (56, b"\xff" * 16), (56, b"int3" + bytes(12))]
)
def test_a_header_that_describes_no_pool_is_refused(gpu_pool, at, value):
    """No pages, no layers, a dtype that is no text, and one that is none of ours."""
    assert gpu_pool._memory is not None
    gpu_pool._memory[at : at + len(value)] = value
    with pytest.raises(errors.FormatMismatch, match="not valid"):
        SegmentBase.open(gpu_pool.address, INCARNATION, SMALL)


def test_more_pages_than_there_is_memory_for_are_refused(gpu_pool):
    assert gpu_pool._memory is not None
    gpu_pool._memory[24:32] = (2**40).to_bytes(8, "little")
    with pytest.raises(errors.WorkerLost, match="cut short"):
        SegmentBase.open(gpu_pool.address, INCARNATION, SMALL)


def test_shm_does_not_read_a_gpu_pool(gpu_pool, local):
    with pytest.raises(errors.WorkerLost, match="are on a GPU"):
        shm.ShmReader(gpu_pool.address, INCARNATION, local)


def source(*transports: str, address: str) -> worker_pb2.PageSource:
    endpoints = [worker_pb2.Endpoint(transport=name, address=address) for name in transports]
    return worker_pb2.PageSource(worker_id="w", incarnation=INCARNATION, format=SMALL.to_proto(), endpoints=endpoints)


def test_a_reader_without_a_gpu_passes_cuda_ipc_over(gpu_pool, local):
    names = ["cuda_ipc", "shm"]
    with pytest.raises(errors.WorkerLost) as caught:
        registry.connect(source(*names, address=gpu_pool.address), local, names)
    assert "cuda_ipc: no GPU is visible; shm: the pages of " in caught.value.message


def test_a_slower_way_than_the_first_is_reported(local, caplog):
    owner = Segment.create(SMALL, 2, INCARNATION)
    registry.connect(source("shm", address=owner.address), local, ["shm"]).close()
    assert not caplog.messages
    registry.connect(source("cuda_ipc", "shm", address=owner.address), local, ["cuda_ipc", "shm"]).close()
    assert caplog.messages == ["pages of w come by shm, because of cuda_ipc: no GPU is visible"]
    owner.close()


def test_only_what_suits_the_pool_is_offered(gpu_pool, local):
    servers = registry.serve(["cuda_ipc", "shm"], local, "127.0.0.1")
    assert [server.endpoint.transport for server in servers] == ["shm"]
    with pytest.raises(errors.FixTheSetup, match="no transport: cuda_ipc: this worker's pages are in host memory"):
        registry.serve(["cuda_ipc"], local, "127.0.0.1")
    assert "on a GPU" in shm.cannot_serve(gpu_pool)


def test_without_cuda_the_reason_is_told(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert cuda.unavailable() == "the package cuda-bindings is not installed"


def test_any_pool_can_be_filled_where_there_is_cuda(monkeypatch, local):
    assert cuda_ipc.cannot_fill(local) == NO_CUDA
    monkeypatch.setattr(cuda, "unavailable", lambda: "")
    assert not cuda_ipc.cannot_fill(local)
    assert cuda_ipc.cannot_serve(local) == "this worker's pages are in host memory"

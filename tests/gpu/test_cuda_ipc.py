"""Pages from one process's GPU memory into another's, and what stands between them and a freed page."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch

from device_pools import MEDIUM, eventually, in_the_middle_of_a_copy, late_write, tensor
from kvstore import cuda
from kvstore.device_segment import DeviceSegment
from kvstore.segment import Segment
from kvstore.segment_base import SegmentBase
from kvstore.transports import base, registry
from kvstore.transports.base import PageReader
from kvstore_owner import INCARNATION, SMALL, Owner, random_page
from protos import errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OLD, NEW = 11, 22
TIMEOUT_S = 20.0
OWNERS = [0, pytest.param(1, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]


@pytest.fixture(scope="module", params=OWNERS, ids=["same GPU", "peer GPU"])
def shared_owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    with Owner(MEDIUM, num_pages=40, device=request.param) as owner:
        yield owner


@pytest.fixture
def owner(shared_owner: Owner) -> Iterator[Owner]:
    yield shared_owner
    shared_owner.reset()


@pytest.fixture
def local() -> Iterator[DeviceSegment]:
    segment = DeviceSegment.create(MEDIUM, 40, incarnation=1)
    yield segment
    segment.close()


@pytest.fixture
def reader(owner: Owner, local: DeviceSegment) -> Iterator[PageReader]:
    reader = connect(owner, local)
    yield reader
    reader.close()


def connect(owner: Owner, segment: DeviceSegment, **source) -> PageReader:
    return registry.connect(owner.source("cuda_ipc", **source), segment, ["cuda_ipc"])


def test_a_segment_is_zeros_and_ends_with_its_last_tensor():
    segment = DeviceSegment.create(MEDIUM, 4096, incarnation=1)  # 8 GiB: other programs may use this GPU too
    assert tensor(segment).shape == (4096, MEDIUM.page_bytes)
    assert not tensor(segment)[::100].any()
    page = tensor(segment)[7]
    page[:] = 5
    segment.close()
    with pytest.raises(ValueError, match="closed"):
        _ = segment.pages
    assert bool((page == 5).all())
    held = torch.cuda.mem_get_info()[0]
    del page
    assert eventually(lambda: torch.cuda.mem_get_info()[0] > held + (5 << 30))


def test_more_memory_than_there_is_cannot_be_had():
    with pytest.raises(cuda.CudaError, match="out of memory"):
        DeviceSegment.create(MEDIUM, 1 << 20, incarnation=1)
    assert torch.zeros(4, device="cuda").sum().item() == 0


def test_scattered_pages_arrive_where_they_should(owner, local, reader):
    seeds = list(range(24))
    refs = owner.fill_random(*seeds)
    rng = np.random.default_rng(0)
    chosen, into = rng.permutation(24)[:17].tolist(), rng.permutation(40)[:17].tolist()
    tensor(local)[:] = 99
    torch.cuda.synchronize()
    assert reader.name == "cuda_ipc"
    assert reader.pull([refs[i] for i in chosen], into, TIMEOUT_S) == 17 * MEDIUM.page_bytes
    for i, page in zip(chosen, into, strict=True):
        assert (tensor(local)[page].cpu().numpy() == random_page(seeds[i], MEDIUM)).all()
    untouched = sorted(set(range(40)) - set(into))
    assert bool((tensor(local)[untouched] == 99).all())
    assert reader.pull([], [], TIMEOUT_S) == 0


def test_small_pages_share_no_memory_with_others():
    """Less than a block of the driver: the handle must still be that of our bytes."""
    with Owner(SMALL, num_pages=8, device=0) as owner:
        local = DeviceSegment.create(SMALL, 8, incarnation=1)
        reader = connect(owner, local)
        reader.pull(owner.fill(*range(1, 9)), list(range(8)), TIMEOUT_S)
        assert tensor(local)[:, 0].tolist() == list(range(1, 9))
        reader.close()
        local.close()


def test_a_page_that_was_freed_before_is_stale_and_the_reader_goes_on(owner, local, reader):
    first, second = owner.fill(OLD, OLD)
    owner.rewrite(first[0], NEW)
    with pytest.raises(errors.StalePage):
        reader.pull([second, first], [0, 1], TIMEOUT_S)
    [third] = owner.fill(NEW)
    reader.pull([second, third], [0, 1], TIMEOUT_S)
    assert bool((tensor(local)[0] == OLD).all())
    assert bool((tensor(local)[1] == NEW).all())


def test_a_page_rewritten_during_the_copy_is_stale(owner, local, reader, monkeypatch):
    [ref] = owner.fill(OLD)
    in_the_middle_of_a_copy(monkeypatch, lambda: owner.rewrite(ref[0], NEW))
    with pytest.raises(errors.StalePage, match="was freed meanwhile"):
        reader.pull([ref], [1], TIMEOUT_S)
    assert tensor(local)[1][[0, -1]].tolist() == [OLD, NEW]  # it really was torn


def test_only_the_fence_stands_between_a_torn_page_and_the_caller(owner, local, reader, monkeypatch):
    """The same without the check: this is what the test above would miss if it could not fail."""
    [ref] = owner.fill(OLD)
    in_the_middle_of_a_copy(monkeypatch, lambda: owner.rewrite(ref[0], NEW))
    monkeypatch.setattr(base, "check_generations", lambda refs, found: None)
    reader.pull([ref], [1], TIMEOUT_S)
    assert tensor(local)[1][[0, -1]].tolist() == [OLD, NEW]


def test_whatever_the_moment_a_pull_that_succeeds_has_the_right_bytes(owner, local, reader):
    right = 0
    for value in range(1, 151):
        refs = owner.fill_and_rewrite_soon([value] * 8, within_s=(value % 5) / 2000)
        with suppress(errors.StalePage):
            reader.pull(refs, list(range(8)), TIMEOUT_S)
            assert bool((tensor(local)[:8] == value).all())
            right += 1
    assert right


def test_a_pull_waits_for_the_steps_that_may_still_write_to_its_pages(owner, local, reader):
    refs = owner.fill(OLD)
    reader.pull(refs, [3], TIMEOUT_S, after=late_write(local))
    torch.cuda.synchronize()
    assert bool((tensor(local)[3] == OLD).all())


def test_without_that_event_the_late_write_wins(owner, local, reader):
    refs = owner.fill(OLD)
    reader.pull(refs, [4], TIMEOUT_S)  # the first one maps the owner's memory, which takes its time
    event = late_write(local)
    reader.pull(refs, [3], TIMEOUT_S)
    assert not event.query()  # the pull waited for nothing
    torch.cuda.synchronize()
    assert bool((tensor(local)[3] == 99).all())


def test_a_killed_owner_is_lost_and_its_memory_comes_back(local):
    with Owner(MEDIUM, num_pages=4096, device=0) as owner:  # 8 GiB: other programs may use this GPU too
        refs = owner.fill(OLD)
        reader = connect(owner, local)
        reader.pull(refs, [0], TIMEOUT_S)
        owner.kill()
        time.sleep(1.0)
        held = torch.cuda.mem_get_info()[0]
        started = time.monotonic()
        with pytest.raises(errors.WorkerLost, match="gone"):
            reader.pull(refs, [1], TIMEOUT_S)
        assert time.monotonic() - started < 5
        assert eventually(lambda: torch.cuda.mem_get_info()[0] > held + (5 << 30))
        with pytest.raises(errors.WorkerLost):
            reader.pull(refs, [1], TIMEOUT_S)
        with pytest.raises(errors.WorkerLost, match="owner cannot be reached: cuda_ipc: "):
            connect(owner, local)
    assert tensor(local)[0, 0].item() == OLD


def test_an_owner_that_closes_its_pool_is_lost_though_it_runs(local):
    with Owner(MEDIUM, num_pages=4, device=0) as owner:
        refs = owner.fill(OLD)
        reader = connect(owner, local)
        reader.pull(refs, [0], TIMEOUT_S)
        owner.close_segment()
        with pytest.raises(errors.WorkerLost, match="gone"):
            reader.pull(refs, [1], TIMEOUT_S)
    torch.cuda.synchronize()
    assert tensor(local)[0, 0].item() == OLD


def test_no_time_left_is_an_owner_lost(owner, reader):
    with pytest.raises(errors.WorkerLost, match=r"in 0\.0 s"):
        reader.pull(owner.fill(OLD), [0], 0.0)


@pytest.mark.parametrize("ref", [(40, 0), (2**32 - 1, 0), (0, 2**64 - 1)])
def test_a_reference_to_what_was_never_there_is_stale(owner, local, reader, ref):
    with pytest.raises(errors.StalePage):
        reader.pull([ref], [0], TIMEOUT_S)
    reader.pull(owner.fill(OLD), [0], TIMEOUT_S)


@pytest.mark.parametrize(("refs", "into"), [([(0, 0)], []), ([(0, 0)], [40]), ([(0, 0)], [-1])])
def test_a_caller_that_names_no_local_page_is_told(reader, refs, into):
    with pytest.raises(ValueError, match="page"):
        reader.pull(refs, into, TIMEOUT_S)


def test_a_pool_that_is_larger_in_its_header_than_in_memory_is_refused(owner, local):
    """A copy past the end of the mapping would end the reader's whole CUDA context."""
    theirs = SegmentBase.open(owner.endpoints["cuda_ipc"], INCARNATION, MEDIUM)
    handle = theirs.header.ipc_handle
    theirs.close()
    with pytest.raises(errors.WorkerLost, match="bytes, not"):
        cuda.MappedMemory(handle, 41 * MEDIUM.page_bytes, 0)
    cuda.MappedMemory(handle, 40 * MEDIUM.page_bytes, 0).close()
    with pytest.raises(errors.WorkerLost, match="cannot map it"):
        cuda.MappedMemory(os.urandom(64), MEDIUM.page_bytes, 0)
    assert torch.zeros(4, device="cuda").sum().item() == 0


def test_another_life_and_another_format_are_refused(owner, local):
    with pytest.raises(errors.WorkerLost, match="life"):
        connect(owner, local, incarnation=INCARNATION + 1)
    with pytest.raises(errors.FormatMismatch, match="page_size"):
        connect(owner, local, format=replace(MEDIUM, page_size=64).to_proto())


def test_a_pool_on_a_gpu_is_no_pool_in_host_memory(owner):
    with pytest.raises(errors.WorkerLost, match="are on a GPU"):
        Segment.open(owner.endpoints["cuda_ipc"], INCARNATION, MEDIUM)


@pytest.mark.parametrize("device", [None, 0], ids=["host to GPU", "GPU to GPU"])
def test_tcp_reaches_pools_on_gpus_through_pinned_memory(device, local):
    with Owner(MEDIUM, num_pages=16, device=device) as owner:
        reader = registry.connect(owner.source("tcp"), local, ["tcp"])
        refs = owner.fill_random(*range(11))
        into = list(range(30, 19, -1))
        reader.pull(refs, into, TIMEOUT_S)
        for seed, page in enumerate(into):
            assert (tensor(local)[page].cpu().numpy() == random_page(seed, MEDIUM)).all()
        owner.rewrite(refs[4][0], NEW)
        with pytest.raises(errors.StalePage):
            reader.pull(refs, into, TIMEOUT_S)
        reader.close()


def test_tcp_takes_pages_of_a_gpu_into_host_memory(owner):
    host = Segment.create(MEDIUM, 12, incarnation=1)
    reader = registry.connect(owner.source("tcp"), host, ["tcp"])
    reader.pull(owner.fill_random(*range(12)), list(range(12)), TIMEOUT_S)
    assert all((host.pages[seed] == random_page(seed, MEDIUM)).all() for seed in range(12))
    reader.close()
    host.close()


def test_tcp_waits_for_the_steps_that_may_still_write(owner, local):
    reader = registry.connect(owner.source("tcp"), local, ["tcp"])
    reader.pull(owner.fill(OLD), [3], TIMEOUT_S, after=late_write(local))
    torch.cuda.synchronize()
    assert bool((tensor(local)[3] == OLD).all())
    reader.close()

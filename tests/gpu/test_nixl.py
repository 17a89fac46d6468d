"""NIXL with pages on GPUs, between processes. tests/test_kvstore_transports.py has the rest, in host memory."""

from collections.abc import Iterator

import pytest
import torch

from device_pools import MEDIUM, late_write, tensor
from kvstore.device_segment import DeviceSegment
from kvstore.segment import Segment
from kvstore.transports import nixl_agent, registry
from kvstore_owner import Owner, random_page
from protos import errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(bool(nixl_agent.unavailable()), reason=nixl_agent.unavailable()),
]

TIMEOUT_S = 20.0
Local = Segment | DeviceSegment


@pytest.fixture(scope="module", params=[0, None], ids=["from GPU", "from host"])
def owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    with Owner(MEDIUM, num_pages=40, device=request.param) as owner:
        yield owner


@pytest.fixture(params=[DeviceSegment, Segment], ids=["to GPU", "to host"])
def local(request: pytest.FixtureRequest) -> Iterator[Local]:
    segment = request.param.create(MEDIUM, 40, incarnation=1)
    yield segment
    segment.close()


def pages(local: Local) -> torch.Tensor:
    """uint8 [num_pages, page_bytes]"""
    return tensor(local).cpu() if isinstance(local, DeviceSegment) else torch.as_tensor(local.pages)


def test_scattered_pages_arrive_and_a_freed_one_is_stale(owner, local):
    reader = registry.connect(owner.source("nixl"), local, ["nixl"])
    refs = owner.fill_random(*range(12))
    into = list(range(30, 18, -1))
    assert reader.pull(refs, into, TIMEOUT_S) == 12 * MEDIUM.page_bytes
    for seed, page in enumerate(into):
        assert (pages(local)[page].numpy() == random_page(seed, MEDIUM)).all()
    assert not pages(local)[:19].any()
    owner.rewrite(refs[4][0], 7)
    with pytest.raises(errors.StalePage):
        reader.pull(refs, into, TIMEOUT_S)
    reader.close()
    owner.reset()


def test_a_pull_waits_for_the_steps_that_may_still_write_to_its_pages(owner):
    local = DeviceSegment.create(MEDIUM, 8, incarnation=1)
    reader = registry.connect(owner.source("nixl"), local, ["nixl"])
    reader.pull(owner.fill(11), [3], TIMEOUT_S, after=late_write(local))
    torch.cuda.synchronize()
    assert bool((tensor(local)[3] == 11).all())
    reader.close()
    local.close()
    owner.reset()


@pytest.mark.parametrize("device", [0, None])
def test_a_killed_owner_is_lost(device, local):
    with Owner(MEDIUM, num_pages=4, device=device) as owner:
        refs = owner.fill(11)
        reader = registry.connect(owner.source("nixl"), local, ["nixl"])
        reader.pull(refs, [0], TIMEOUT_S)
        owner.kill()
        with pytest.raises(errors.WorkerLost):
            reader.pull(refs, [1], TIMEOUT_S)
        with pytest.raises(errors.WorkerLost):
            reader.pull(refs, [1], TIMEOUT_S)
    assert bool((pages(local)[0] == 11).all())

"""What is particular to NIXL; tests/test_kvstore_transports.py has what every transport must do."""

import sys
import time
import weakref

import pytest

from kvstore.segment import Segment
from kvstore.transports import nixl_agent, registry
from kvstore.transports.nixl_address import NixlAddress
from kvstore_owner import SMALL, Owner
from protos import errors

needs_nixl = pytest.mark.skipif(bool(nixl_agent.unavailable()), reason=nixl_agent.unavailable())


@pytest.mark.parametrize("device", [None, 3])
def test_an_address_says_where_the_pool_is(device):
    where = NixlAddress(2**47, 2**63, 70_000, device, b"of the agent")
    assert NixlAddress.unpack(where.pack()) == where


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nowhere",
        "AAAA",
        "é",
        "A" * 70_000,
        NixlAddress(1, 2, 0, None, b"").pack(),
        NixlAddress(1, 2, 2**40, 0, b"").pack(),
    ],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(errors.WorkerLost, match="no address of a pool"):
        NixlAddress.unpack(address)


def test_without_the_package_the_reason_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    assert "pip install 'diptych[nixl]'" in nixl_agent.unavailable()
    segment = Segment.create(SMALL, 1, incarnation=1)
    with pytest.raises(errors.FixTheSetup, match="no transport: nixl: the package nixl cannot be imported"):
        registry.serve(["nixl"], segment, "127.0.0.1")
    segment.close()


@needs_nixl
def test_metadata_that_is_none_is_an_owner_lost():
    segment = Segment.create(SMALL, 1, incarnation=1)
    with Owner() as owner:
        source = owner.source("nixl")
        source.endpoints[0].address = NixlAddress(1, 2, 3, None, b"of nobody").pack()
        with pytest.raises(errors.WorkerLost, match="owner cannot be reached: nixl: NIXL failed"):
            registry.connect(source, segment, ["nixl"])
    segment.close()


@needs_nixl
def test_after_an_owner_that_does_not_answer_nothing_can_arrive_any_more(monkeypatch):
    """Over TCP, where its own threads would have to answer."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    local = Segment.create(SMALL, 8, incarnation=1)
    with Owner() as owner:
        refs = owner.fill(*range(1, 9))
        reader = registry.connect(owner.source("nixl"), local, ["nixl"])
        reader.pull(refs, list(range(8)), 20.0)
        local.pages[:] = 99
        agent = weakref.ref(reader._agent._agent)
        owner.freeze()
        started = time.monotonic()
        with pytest.raises(errors.WorkerLost, match="in time") as caught:
            reader.pull(refs, list(range(8)), 0.5)
        assert time.monotonic() - started < 10
        assert agent() is None  # though the error is still held, and with it the frames that it went through
        assert caught.tb is not None
        assert (local.pages == 99).all()
    local.close()


@needs_nixl
def test_an_owner_that_has_closed_its_pool_is_lost():
    local = Segment.create(SMALL, 8, incarnation=1)
    with Owner() as owner:
        refs = owner.fill(5)
        reader = registry.connect(owner.source("nixl"), local, ["nixl"])
        reader.pull(refs, [0], 20.0)
        owner.close_segment()
        with pytest.raises(errors.WorkerLost, match="closed its pool"):
            reader.pull(refs, [1], 20.0)
    local.close()

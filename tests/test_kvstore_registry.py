"""The choice of a transport."""

from collections.abc import Iterator

import pytest

from kvstore.segment import Segment
from kvstore.transports import registry
from kvstore_owner import INCARNATION, SMALL
from protos import errors
from protos.v1 import worker_pb2


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(SMALL, 2, INCARNATION)
    yield segment
    segment.close()


@pytest.fixture
def local() -> Iterator[Segment]:
    segment = Segment.create(SMALL, 2, incarnation=1)
    yield segment
    segment.close()


@pytest.fixture
def source(segment: Segment) -> Iterator[worker_pb2.PageSource]:
    servers = registry.serve(["shm", "tcp"], segment, "127.0.0.1")
    endpoints = [server.endpoint for server in servers]
    yield worker_pb2.PageSource(worker_id="w", incarnation=INCARNATION, format=SMALL.to_proto(), endpoints=endpoints)
    for server in servers:
        server.close()


def chosen(source: worker_pb2.PageSource, local: Segment, allowed: list[str]) -> str:
    reader = registry.connect(source, local, allowed)
    reader.close()
    return reader.name


def test_endpoints_are_offered_in_the_order_asked_for(segment: Segment):
    servers = registry.serve(["tcp", "shm"], segment, "127.0.0.1")
    assert [server.endpoint.transport for server in servers] == ["tcp", "shm"]
    for server in servers:
        server.close()
        server.close()


def test_the_owners_first_endpoint_that_is_allowed_is_taken(source, local):
    assert chosen(source, local, ["tcp", "shm"]) == "shm"
    assert chosen(source, local, ["tcp"]) == "tcp"


def test_one_that_does_not_work_from_here_is_passed_over(source, local):
    source.endpoints[0].address = "/proc/4194305/fd/3"
    assert chosen(source, local, ["shm", "tcp"]) == "tcp"


def test_the_reason_of_each_is_told(source, local):
    source.endpoints[0].address = "/proc/4194305/fd/3"
    source.endpoints.add(transport="carrier-pigeon", address="loft 7")
    with pytest.raises(errors.WorkerLost) as caught:
        registry.connect(source, local, ["shm"])
    for reason in ("w cannot be reached", "shm: /proc/4194305", "tcp: not allowed", "carrier-pigeon: not known"):
        assert reason in caught.value.message
    del source.endpoints[:]
    with pytest.raises(errors.WorkerLost, match="offers no transport"):
        registry.connect(source, local, ["shm"])


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999", "127.0.0.1:1"])
def test_an_address_that_leads_nowhere_is_a_reason_too(source, local, address):
    for endpoint in source.endpoints:
        endpoint.address = address
    with pytest.raises(errors.WorkerLost, match=r"shm: .*; tcp: "):
        registry.connect(source, local, ["shm", "tcp"])


def test_a_format_that_is_no_format_is_refused(source, local):
    source.format.layers = 0
    with pytest.raises(errors.FormatMismatch, match="layers"):
        registry.connect(source, local, ["shm"])


def test_an_unknown_transport_cannot_be_served(segment):
    with pytest.raises(errors.FixTheSetup, match="'pigeon': there are cuda_ipc, shm, nixl, tcp"):
        registry.serve(["tcp", "pigeon"], segment, "127.0.0.1")


def test_a_host_that_is_not_ours_cannot_be_served(segment):
    with pytest.raises(errors.FixTheSetup, match="cannot listen on"):
        registry.serve(["tcp"], segment, "192.0.2.1")

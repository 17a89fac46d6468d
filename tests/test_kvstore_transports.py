"""What every transport must do, between two processes: the right bytes, and never a page that was freed meanwhile."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from kvstore.segment import Segment
from kvstore.transports import base, nixl, nixl_agent, registry, shm, tcp_wire
from kvstore.transports.base import PageReader
from kvstore_owner import INCARNATION, LARGE, SMALL, Owner
from protos import errors

OLD, NEW = 11, 22
TIMEOUT_S = 20.0


WITHOUT_NIXL = pytest.mark.skipif(bool(nixl_agent.unavailable()), reason=nixl_agent.unavailable())


@pytest.fixture(params=["shm", "tcp", pytest.param("nixl", marks=WITHOUT_NIXL)])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared_owner() -> Iterator[Owner]:
    with Owner() as owner:
        yield owner


@pytest.fixture
def owner(shared_owner: Owner) -> Iterator[Owner]:
    yield shared_owner
    shared_owner.reset()


@pytest.fixture(scope="module")
def shared_large_owner() -> Iterator[Owner]:
    with Owner(LARGE, num_pages=3) as owner:
        yield owner


@pytest.fixture
def large_owner(shared_large_owner: Owner) -> Iterator[Owner]:
    """Its pages are larger than all that sockets can hold, so that one is still being read when it changes."""
    yield shared_large_owner
    shared_large_owner.reset()


@pytest.fixture
def mortal() -> Iterator[Owner]:
    """For tests that kill it."""
    with Owner(LARGE, num_pages=3) as owner:
        yield owner


@pytest.fixture
def local() -> Iterator[Segment]:
    segment = Segment.create(SMALL, 8, incarnation=1)
    yield segment
    segment.close()


@pytest.fixture
def large_local() -> Iterator[Segment]:
    segment = Segment.create(LARGE, 2, incarnation=1)
    yield segment
    segment.close()


@pytest.fixture
def connect() -> Iterator[Callable[[Owner, str, Segment], PageReader]]:
    readers = []

    def connect(owner: Owner, transport: str, segment: Segment) -> PageReader:
        readers.append(registry.connect(owner.source(transport), segment, [transport]))
        return readers[-1]

    yield connect
    for reader in readers:
        reader.close()


def in_the_middle_of_a_copy(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """When part of the first page has been copied, `act`; then the copy goes on. Only the timing is changed.

    Of readers that are connected after this.
    """
    acts = iter([act])

    def copy_page(self: shm.ShmReader, page: int, into: int) -> None:
        half = self._segment.format.page_bytes // 2
        self._local.pages[into, :half] = self._owner.pages[page, :half]
        next(acts, lambda: None)()
        self._local.pages[into, half:] = self._owner.pages[page, half:]

    receive = tcp_wire.receive

    def receive_in_two_parts(connection: object, into: memoryview, deadline: float) -> None:
        if len(into) == LARGE.page_bytes:
            receive(connection, into[: 1 << 16], deadline)
            into = into[1 << 16 :]
            next(acts, lambda: None)()
        receive(connection, into, deadline)

    prepare = nixl_agent.NixlAgent.prepare

    def prepare_halves(self: nixl_agent.NixlAgent, blocks: nixl_agent.Blocks, peer: str = "") -> int:
        if blocks.size == LARGE.page_bytes:
            blocks = replace(blocks, size=blocks.size // 2, count=2 * blocks.count)
        return prepare(self, blocks, peer)

    def read_pages(self: nixl.NixlReader, pages: list[int], into: list[int], deadline: float) -> None:
        for half in (0, 1):
            here, there = ([2 * page + half for page in ends] for ends in (into, pages))
            self._agent.read(self._pages_here, here, self._pages_there, there, deadline)
            next(acts, lambda: None)()

    monkeypatch.setattr(nixl_agent.NixlAgent, "prepare", prepare_halves)
    monkeypatch.setattr(nixl.NixlReader, "_read_pages", read_pages)
    monkeypatch.setattr(shm.ShmReader, "_copy_page", copy_page)
    monkeypatch.setattr(tcp_wire, "receive", receive_in_two_parts)


def test_pages_arrive_where_they_should(owner, local, connect, transport):
    refs = owner.fill(*range(1, 9))
    reader = connect(owner, transport, local)
    assert reader.name == transport
    local.pages[:] = 99
    wanted = [refs[5], refs[0], refs[3]]
    assert reader.pull(wanted, [2, 7, 0], TIMEOUT_S) == 3 * SMALL.page_bytes
    assert [sorted(set(page.tolist())) for page in local.pages] == [[4], [99], [6], [99], [99], [99], [99], [1]]
    assert reader.pull([], [], TIMEOUT_S) == 0


def test_a_page_that_was_freed_before_is_stale_and_the_reader_goes_on(owner, local, connect, transport):
    reader = connect(owner, transport, local)
    first, second = owner.fill(OLD, OLD)
    owner.rewrite(first[0], NEW)
    with pytest.raises(errors.StalePage):
        reader.pull([second, first], [0, 1], TIMEOUT_S)
    [third] = owner.fill(NEW)
    reader.pull([second, third], [0, 1], TIMEOUT_S)
    assert (local.pages[0] == OLD).all()
    assert (local.pages[1] == NEW).all()


def test_a_page_rewritten_during_the_copy_is_stale(large_owner, large_local, connect, transport, monkeypatch):
    [ref] = large_owner.fill(OLD)
    in_the_middle_of_a_copy(monkeypatch, lambda: large_owner.rewrite(ref[0], NEW))
    with pytest.raises(errors.StalePage, match="was freed meanwhile"):
        connect(large_owner, transport, large_local).pull([ref], [1], TIMEOUT_S)
    assert (large_local.pages[1][0], large_local.pages[1][-1]) == (OLD, NEW)  # it really was torn


def test_only_the_fence_stands_between_a_torn_page_and_the_caller(
    large_owner, large_local, connect, transport, monkeypatch
):
    """The same without the check: this is what the test above would miss if it could not fail."""
    [ref] = large_owner.fill(OLD)
    in_the_middle_of_a_copy(monkeypatch, lambda: large_owner.rewrite(ref[0], NEW))
    monkeypatch.setattr(base, "check_generations", lambda refs, found: None)
    connect(large_owner, transport, large_local).pull([ref], [1], TIMEOUT_S)
    assert (large_local.pages[1][0], large_local.pages[1][-1]) == (OLD, NEW)


def test_a_page_freed_during_the_copy_is_stale_though_its_bytes_are_still_there(
    large_owner, large_local, connect, transport, monkeypatch
):
    first, second = large_owner.fill(OLD, OLD)
    in_the_middle_of_a_copy(monkeypatch, lambda: large_owner.free(second[0]))
    reader = connect(large_owner, transport, large_local)
    with pytest.raises(errors.StalePage):
        reader.pull([first, second], [0, 1], TIMEOUT_S)
    reader.pull([first], [0], TIMEOUT_S)


def test_whatever_the_moment_a_pull_that_succeeds_has_the_right_bytes(owner, local, connect, transport):
    reader = connect(owner, transport, local)
    for value in range(1, 251):
        refs = owner.fill_and_rewrite_soon([value] * 4, within_s=(value % 3) / 1000)
        with suppress(errors.StalePage):
            reader.pull(refs, [0, 1, 2, 3], TIMEOUT_S)
            assert (local.pages[:4] == value).all()


def test_another_life_is_refused(owner, local, transport):
    with pytest.raises(errors.WorkerLost, match="life"):
        registry.connect(owner.source(transport, incarnation=INCARNATION + 1), local, [transport])


def test_another_format_is_refused_with_the_difference(owner, local, transport):
    other = replace(SMALL, page_size=64, dtype="bfloat16")
    with pytest.raises(errors.FormatMismatch, match="page_size 16 against 64, dtype float32 against bfloat16"):
        registry.connect(owner.source(transport, format=other.to_proto()), local, [transport])


def test_an_owner_killed_in_the_middle_of_a_copy_is_lost(mortal, large_local, connect, transport, monkeypatch):
    refs = mortal.fill(OLD, OLD)
    in_the_middle_of_a_copy(monkeypatch, mortal.kill)
    reader = connect(mortal, transport, large_local)
    started = time.monotonic()
    with pytest.raises(errors.WorkerLost):
        reader.pull(refs, [0, 1], TIMEOUT_S)
    assert time.monotonic() - started < TIMEOUT_S / 2
    with pytest.raises(errors.WorkerLost):
        reader.pull(refs, [0, 1], TIMEOUT_S)


def test_an_owner_killed_between_two_pulls_is_lost(mortal, large_local, connect, transport):
    refs = mortal.fill(OLD)
    reader = connect(mortal, transport, large_local)
    reader.pull(refs, [0], TIMEOUT_S)
    mortal.kill()
    with pytest.raises(errors.WorkerLost):
        reader.pull(refs, [0], TIMEOUT_S)
    with pytest.raises(errors.WorkerLost, match=f"owner cannot be reached: {transport}: "):
        connect(mortal, transport, large_local)


def test_no_time_left_is_an_owner_lost(owner, local, connect, transport):
    reader = connect(owner, transport, local)
    with pytest.raises(errors.WorkerLost, match=r"in 0\.0 s"):
        reader.pull(owner.fill(OLD), [0], 0.0)


def test_a_closed_reader_has_lost_its_owner(owner, local, connect, transport):
    reader = connect(owner, transport, local)
    reader.close()
    reader.close()
    with pytest.raises(errors.WorkerLost):
        reader.pull(owner.fill(OLD), [0], TIMEOUT_S)


@pytest.mark.parametrize("ref", [(8, 0), (2**32 - 1, 0), (0, 2**64 - 1)])
def test_a_reference_to_what_was_never_there_is_stale(owner, local, connect, transport, ref):
    reader = connect(owner, transport, local)
    with pytest.raises(errors.StalePage):
        reader.pull([ref], [0], TIMEOUT_S)
    reader.pull(owner.fill(OLD), [0], TIMEOUT_S)


@pytest.mark.parametrize(("refs", "into"), [([(0, 0)], []), ([(0, 0)], [8]), ([(0, 0)], [-1])])
def test_a_caller_that_names_no_local_page_is_told(owner, local, connect, transport, refs, into):
    with pytest.raises(ValueError, match="page"):
        connect(owner, transport, local).pull(refs, into, TIMEOUT_S)

"""`verify: checksum`: what is damaged on its way is thrown away, with an error that says so."""

import threading

import pytest
import torch

from kvstore.pool import PageId
from kvstore.segment import Segment
from kvstore.transports.shm import ShmReader
from kvstore_owner import SMALL, Owner, random_page
from prefill_worker.role import PrefillRole
from protos import errors
from protos.v1 import worker_pb2
from role_kit import PAGE, ScriptedPuller, make_engine, request, updates
from worker.page_checksums import PageChecksums
from worker.puller import Pulled, Puller


@pytest.fixture
def local():
    segment = Segment.create(SMALL, 8, incarnation=1)
    yield segment
    segment.close()


def checksums(segment: Segment) -> PageChecksums:
    return PageChecksums(torch.as_tensor(segment.pages))


def pull(local: Segment, verify: bool, refs: list[worker_pb2.PageRef], source: worker_pb2.PageSource) -> Pulled:
    ended: list[Pulled] = []
    event = threading.Event()

    def done(result: Pulled) -> None:
        ended.append(result)
        event.set()

    puller = Puller(local, ["shm"], lambda tell: tell(), checksums=checksums(local) if verify else None)
    puller.pull(source, refs, [PageId(5), PageId(2)], 20.0, done)
    assert event.wait(20.0)
    puller.close()
    return ended[0]


@pytest.fixture
def flipped(monkeypatch):
    """One bit of the second page's copy."""
    copy = ShmReader._copy

    def damage(self, refs, into, timeout_s, after):
        found = copy(self, refs, into, timeout_s, after)
        self._segment.pages[into[1], 77] ^= 8
        return found

    monkeypatch.setattr(ShmReader, "_copy", damage)


def named(local: Segment, owner: Owner) -> list[worker_pb2.PageRef]:
    """Two of the owner's pages with their true checksums."""
    for page, seed in enumerate((1, 2)):
        local.pages[page] = random_page(seed, SMALL)
    pages = zip(owner.fill_random(1, 2), checksums(local).of([0, 1]), strict=True)
    return [worker_pb2.PageRef(page=ref[0], generation=ref[1], checksum=value) for ref, value in pages]


def test_what_arrives_as_it_was_named_is_taken(local):
    with Owner() as owner:
        assert pull(local, True, named(local, owner), owner.source("shm")).error is None


def test_a_bit_that_flips_on_the_way_is_found(local, flipped):
    with Owner() as owner:
        refs = named(local, owner)
        error = pull(local, True, refs, owner.source("shm")).error
        assert isinstance(error, errors.CorruptPage)
        assert f"page {refs[1].page}" in error.message
        assert error.stage == "hand_over"


def test_nobody_looks_where_nobody_asked_for_it(local, flipped):
    with Owner() as owner:
        assert pull(local, False, named(local, owner), owner.source("shm")).error is None


def test_pages_of_an_owner_without_checksums_are_taken(local):
    with Owner() as owner:
        refs = [worker_pb2.PageRef(page=page, generation=generation) for page, generation in owner.fill(1, 2)]
        assert pull(local, True, refs, owner.source("shm")).error is None


def seal_three_pages(cache: torch.Tensor | None) -> list[worker_pb2.PageRef]:
    role = PrefillRole(make_engine()[0], ScriptedPuller())
    role.checksums = None if cache is None else PageChecksums(cache)
    role.handle("r", request("prefill", "a", range(2 * PAGE + 1)))
    for _ in range(2):
        role.step()
    return [ref for update in updates(role) for ref in update.sealed]


def test_a_prefill_worker_names_each_page_with_its_checksum():
    cache = torch.randn(16, 12)
    refs = seal_three_pages(cache)
    assert [ref.index for ref in refs] == [0, 1, 2]
    assert [ref.checksum for ref in refs] == PageChecksums(cache).of([ref.page for ref in refs])
    assert [ref.checksum for ref in seal_three_pages(None)] == [0, 0, 0]


def test_no_page_has_the_checksum_that_means_none():
    assert PageChecksums(torch.zeros(1, 4)).of([0]) == [1]

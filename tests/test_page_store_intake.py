"""Pages come out of a worker's pool whole, and what it has freed does not come."""

import pytest

from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.page_state import PageId
from kvstore.sealed_page import SealedPage
from kvstore.segment import Segment
from kvstore.tiers.page_tiers import PageTiers
from kvstore_owner import SMALL, Owner, random_page
from page_store.intake import Intake
from protos import errors

KEYS = [PageKey(bytes([number]) * 16) for number in range(16)]


@pytest.fixture(scope="module")
def shared_owner():
    with Owner(num_pages=12) as owner:
        yield owner


@pytest.fixture
def owner(shared_owner):
    yield shared_owner
    shared_owner.reset()


@pytest.fixture
def tiers():
    segment = Segment.create(SMALL, 16, incarnation=1)
    tiers = PageTiers(segment, None, 0, lambda page: None, lambda key: None)
    yield tiers
    tiers.close()
    segment.close()


def sealed(owner: Owner, count: int) -> list[SealedPage]:
    """Pages of one prompt, with `random_page` of 0, 1, ..."""
    refs = owner.fill_random(*range(count))
    lineages = [Lineage(key, KEYS[0], KEYS[index - 1] if index else None) for index, key in enumerate(KEYS[:count])]
    return [SealedPage(lineage, PageId(page), gen) for lineage, (page, gen) in zip(lineages, refs, strict=True)]


def right_pages(tiers: PageTiers) -> int:
    """How long a prefix is there; each page has its own bytes."""
    found = tiers.locate(KEYS, 0)
    for seed, one in enumerate(found):
        assert (tiers.segment.pages[one.page] == random_page(seed, SMALL)).all()
    return len(found)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_pages_come_whole_and_only_once(owner, tiers, transport):
    intake = Intake(tiers, owner.source(transport), ["shm", "tcp"])
    pages = sealed(owner, 10)
    intake.take(pages[:6])
    intake.take([*pages, *pages])
    assert right_pages(tiers) == 10
    assert tiers.ledger.counters().arrived == 10
    intake.close()


def test_what_was_freed_meanwhile_is_passed_over_and_the_others_come(owner, tiers):
    pages = sealed(owner, 9)
    owner.rewrite(pages[6].page, 255)
    Intake(tiers, owner.source("shm"), ["shm"]).take(pages)
    assert right_pages(tiers) == 6  # the later ones have no parent here
    counters = tiers.ledger.counters()
    assert (counters.arrived, counters.stale) == (6, 1)
    tiers.ledger._clock = lambda: float("inf")
    tiers.ledger.let_go_quiet()
    assert tiers.ledger._pool.held_pages == 0


def test_a_worker_that_is_gone_leaves_no_room_taken(tiers):
    with Owner() as owner:
        pages = sealed(owner, 4)
        intake = Intake(tiers, owner.source("shm"), ["shm"])
        owner.kill()
        with pytest.raises(errors.WorkerLost):
            intake.take(pages)
        intake.close()
    assert tiers.ledger._pool.held_pages == 0
    assert tiers.locate(KEYS, 0) == []


def test_another_page_format_is_refused_by_its_difference(owner, tiers):
    other = owner.source("shm")
    other.format.page_size = 32
    with pytest.raises(errors.FormatMismatch, match="page_size 16 against 32"):
        Intake(tiers, other, ["shm"]).take(sealed(owner, 1))
    assert tiers.ledger._pool.held_pages == 0

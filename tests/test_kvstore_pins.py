"""Hand-over pins: held until release, the router's end or the deadline; every call may be repeated."""

import pytest

from kvstore.keys import PageKey
from kvstore.page_state import IllegalMove, PageState
from kvstore.pins import PinTable
from kvstore.pool import PageId, PagePool


@pytest.fixture
def pool() -> PagePool:
    return PagePool(4)


def sealed(pool: PagePool, n: int) -> list[PageId]:
    """Pages whose sequence has ended: sealed, cached, read by nobody."""
    credit = pool.promise(n)
    pages = []
    for _ in range(n):
        page = credit.take()
        pool.begin_fill(page)
        pool.seal(page, PageKey(page.to_bytes(16, "little")))
        pages.append(page)
    pool.release(reversed(pages))
    return pages


def test_a_pin_keeps_pages_that_nobody_else_reads(pool: PagePool):
    pins = PinTable(pool)
    pages = sealed(pool, 2)
    pins.hold("a", "router", pages, deadline=10.0)
    assert (pool.held_pages, pool.available_pages, len(pins)) == (2, 2, 1)
    pins.release("a")
    pins.release("a")
    assert (pool.held_pages, pool.available_pages, len(pins)) == (0, 4, 0)


def test_chunks_add_to_a_pin_and_no_page_is_pinned_twice(pool: PagePool):
    pins = PinTable(pool)
    pages = sealed(pool, 3)
    pins.hold("a", "router", pages[:1], 10.0)
    pins.hold("a", "router", pages[:1], 10.0)
    pins.hold("a", "router", [*pages, pages[2]], 10.0)
    assert [pool.readers(page) for page in pages] == [1, 1, 1]
    pins.hold("b", "router", pages[:1], 10.0)
    assert pool.readers(pages[0]) == 2
    pins.release("a")
    assert [pool.readers(page) for page in pages] == [1, 0, 0]


def test_the_tail_is_evicted_first_after_a_release(pool: PagePool):
    pins = PinTable(pool)
    pages = sealed(pool, 4)
    pins.hold("a", "router", pages[:2], 10.0)
    pins.hold("a", "router", pages[2:], 10.0)
    pins.release("a")
    credit = pool.promise(4)
    assert [credit.take() for _ in range(4)] == pages[::-1]


def test_a_deadline_ends_a_pin(pool: PagePool):
    pins = PinTable(pool)
    pages = sealed(pool, 3)
    pins.hold("late", "router", pages[:1], 20.0)
    pins.hold("early", "router", pages[1:2], 10.0)
    pins.hold("never", "router", pages[2:], float("inf"))
    assert pins.expire(9.9) == []
    assert pins.expire(10.0) == ["early"]
    assert [pool.readers(page) for page in pages] == [1, 0, 1]
    assert pins.expire(19.0) == []
    assert pins.expire(1e9) == ["late"]
    pins.hold("again", "router", pages[:1], 5.0)
    assert pins.expire(1e9) == ["again"]
    assert pool.held_pages == 1


def test_a_new_deadline_takes_the_place_of_the_old_one(pool: PagePool):
    pins = PinTable(pool)
    pages = sealed(pool, 1)
    pins.hold("a", "router", pages, 10.0)
    pins.hold("a", "router", [], 20.0)
    assert pins.expire(15.0) == []
    pins.hold("a", "router", [], 12.0)
    assert pins.expire(15.0) == ["a"]


def test_a_router_that_is_gone_takes_its_pins_along(pool: PagePool):
    pins = PinTable(pool)
    pages = sealed(pool, 3)
    for request, owner, page in (("a", "r1", 0), ("b", "r2", 1), ("c", "r1", 2)):
        pins.hold(request, owner, [pages[page]], 10.0)
    assert pins.drop_owner("r1") == ["a", "c"]
    assert pins.drop_owner("r1") == []
    assert [pool.readers(page) for page in pages] == [0, 1, 0]


def test_a_page_that_is_not_sealed_cannot_be_pinned(pool: PagePool):
    pins = PinTable(pool)
    pages = sealed(pool, 1)
    page = pool.promise(1).take()
    with pytest.raises(IllegalMove):
        pins.hold("a", "router", [*pages, page], 10.0)
    assert (pool.readers(pages[0]), pool.state(page), len(pins)) == (0, PageState.RESERVED, 0)

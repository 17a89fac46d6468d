"""The page pool: exact page ids, promises, eviction, generations."""

import numpy as np
import pytest

from kvstore.keys import PageKey
from kvstore.page_state import IllegalMove, PageState
from kvstore.pool import OutOfPages, PageId, PagePool
from protos import errors


def key(n: int) -> PageKey:
    return PageKey(n.to_bytes(16, "little"))


def fill(pool: PagePool, *keys: PageKey | None) -> list[PageId]:
    """Sealed pages, each with one reader."""
    credit = pool.promise(len(keys))
    pages = []
    for page_key in keys:
        page = credit.take()
        pool.begin_fill(page)
        pool.seal(page, page_key)
        pages.append(page)
    return pages


def test_pages_are_handed_out_in_order_and_come_back_at_the_end():
    pool = PagePool(4)
    credit = pool.promise(3)
    assert [credit.take() for _ in range(3)] == [0, 1, 2]
    pool.abandon(PageId(1))
    assert [pool.promise(1).take() for _ in range(2)] == [3, 1]


def test_a_page_goes_through_its_states():
    pool = PagePool(1)
    assert pool.state(PageId(0)) is PageState.FREE
    page = pool.promise(1).take()
    assert (pool.state(page), pool.writers(page), pool.readers(page)) == (PageState.RESERVED, 1, 0)
    pool.begin_fill(page)
    assert (pool.state(page), pool.writers(page), pool.readers(page)) == (PageState.FILLING, 1, 0)
    assert pool.seal(page, key(1))
    assert (pool.state(page), pool.writers(page), pool.readers(page)) == (PageState.SEALED, 0, 1)
    assert (pool.held_pages, pool.available_pages) == (1, 0)
    pool.release([page])
    assert (pool.state(page), pool.writers(page), pool.readers(page)) == (PageState.SEALED, 0, 0)
    assert (pool.held_pages, pool.available_pages) == (0, 1)
    assert pool.generation(page) == 0
    pool.clear_cache()
    assert pool.state(page) is PageState.FREE
    assert pool.generation(page) == 1


def test_each_way_to_free_raises_the_generation_in_the_shared_array():
    generations = np.zeros(4, np.int64)
    pool = PagePool(4, generations)
    credit = pool.promise(2)
    pool.abandon(credit.take())  # reserved
    page = credit.take()
    pool.begin_fill(page)
    pool.abandon(page)  # filling
    pool.release(fill(pool, None))  # sealed, without a key
    pool.release(fill(pool, key(1)))
    assert generations.tolist() == [1, 1, 1, 0]
    pool.clear_cache()  # evicted
    assert generations.tolist() == [1, 1, 1, 1]


def test_a_pool_goes_on_from_the_generations_it_is_given():
    pool = PagePool(2, [5, 7])
    pool.abandon(pool.promise(1).take())
    assert [pool.generation(PageId(page)) for page in range(2)] == [6, 7]
    with pytest.raises(ValueError, match="3 generations for 2 pages"):
        PagePool(2, [0, 0, 0])


def test_the_page_released_first_is_evicted_first():
    evicted: list[PageKey] = []
    pool = PagePool(4, on_evict=evicted.append)
    pages = fill(pool, *map(key, range(4)))
    pool.release([pages[2]])
    pool.release([pages[3], pages[1], pages[0]])
    credit = pool.promise(3)
    assert [credit.take() for _ in range(3)] == [2, 3, 1]
    assert evicted == [key(2), key(3), key(1)]
    assert pool.match([key(0)]) == [0]


def test_reading_a_page_again_makes_it_young():
    pool = PagePool(2)
    pages = fill(pool, key(0), key(1))
    pool.release(pages)
    pool.acquire([pages[0]])
    pool.release([pages[0]])
    assert pool.promise(1).take() == 1


def test_free_pages_go_before_cached_ones():
    pool = PagePool(3)
    pool.release(fill(pool, key(0)))
    assert [pool.promise(1).take() for _ in range(3)] == [1, 2, 0]


def test_match_ends_at_the_first_miss_and_takes_no_lease():
    pool = PagePool(4)
    pool.release(fill(pool, key(0), key(1), key(3)))
    assert pool.match([key(0), key(1), key(2), key(3)]) == [0, 1]
    assert pool.match([key(2), key(0)]) == []
    assert pool.held_pages == 0


def test_the_first_page_with_a_key_wins():
    pool = PagePool(2)
    first, second = fill(pool, key(0), key(0))
    assert pool.match([key(0)]) == [first]
    pool.release([second])  # not in the index, so free at once
    assert pool.state(second) is PageState.FREE
    pool.release([first])
    assert pool.state(first) is PageState.SEALED


def test_seal_says_whether_the_page_is_indexed():
    pool = PagePool(3)
    credit = pool.promise(3)
    said = []
    for page_key in (key(0), key(0), None):
        page = credit.take()
        pool.begin_fill(page)
        said.append(pool.seal(page, page_key))
    assert said == [True, False, False]


def test_a_promise_holds_until_it_is_taken_or_closed():
    pool = PagePool(4)
    credit = pool.promise(3)
    assert (pool.available_pages, pool.held_pages) == (1, 0)
    with pytest.raises(OutOfPages, match="2 pages are needed, 1 of 4"):
        pool.promise(2)
    credit.take()
    assert (pool.available_pages, credit.remaining) == (1, 2)
    credit.close()
    credit.close()
    assert (pool.available_pages, credit.remaining) == (3, 0)
    with pytest.raises(IllegalMove, match="spent or closed"):
        credit.take()


def test_out_of_pages_is_a_refusal_that_callers_know():
    assert issubclass(OutOfPages, errors.Overloaded)
    with pytest.raises(errors.Overloaded):
        PagePool(1).promise(2)
    with pytest.raises(ValueError, match="-1"):
        PagePool(1).promise(-1)


def test_acquiring_cached_pages_cannot_break_a_promise():
    pool = PagePool(2)
    pages = fill(pool, key(0), key(1))
    pool.release(pages)
    credit = pool.promise(1)
    pool.acquire([pages[1]])
    with pytest.raises(OutOfPages):
        pool.acquire([pages[0]])
    pool.acquire([pages[1]])  # held already: costs nothing
    assert credit.take() == pages[0]


def test_acquire_takes_all_or_none():
    pool = PagePool(3)
    pages = fill(pool, key(0), key(1))
    pool.release(pages)
    promised = pool.promise(2)
    with pytest.raises(OutOfPages):
        pool.acquire(pages)
    with pytest.raises(IllegalMove, match="only a sealed page"):
        pool.acquire([pages[0], PageId(2)])
    assert [pool.readers(page) for page in pages] == [0, 0]
    promised.close()
    pool.acquire([pages[0], pages[0]])
    assert (pool.readers(pages[0]), pool.available_pages) == (2, 2)


def test_admit_reuses_and_promises_in_one_step():
    pool = PagePool(5)
    pool.release(reversed(fill(pool, key(0), key(1))))
    pages, credit = pool.admit([key(0), key(1), key(2)], 4)
    assert pages == [0, 1]
    assert (credit.remaining, pool.held_pages, pool.available_pages) == (2, 2, 1)


def test_admit_does_not_evict_what_it_matched():
    pool = PagePool(2)
    pool.release(fill(pool, key(0)))
    pages, credit = pool.admit([key(0), key(1)], 2)
    assert (pages, credit.take()) == ([0], 1)


def test_admit_that_does_not_fit_changes_nothing():
    pool = PagePool(3)
    pool.release(fill(pool, key(0), key(1)))
    with pytest.raises(OutOfPages):
        pool.admit([key(0), key(1)], 4)
    assert (pool.held_pages, pool.available_pages) == (0, 3)
    with pytest.raises(ValueError, match="2 keys for 1 pages"):
        pool.admit([key(0), key(1)], 1)


def test_clear_cache_leaves_pages_in_use_to_their_readers():
    evicted: list[PageKey] = []
    pool = PagePool(3, on_evict=evicted.append)
    pages = fill(pool, key(0), key(1))
    pool.release([pages[1]])
    pool.clear_cache()
    assert sorted(evicted) == [key(0), key(1)]
    assert pool.match([key(0)]) == []
    assert pool.state(pages[0]) is PageState.SEALED
    pool.release([pages[0]])
    assert pool.state(pages[0]) is PageState.FREE
    assert len(evicted) == 2


def test_a_failing_listener_loses_no_page():
    def fail(_: PageKey) -> None:
        raise RuntimeError("listener")

    pool = PagePool(1, on_evict=fail)
    pool.release(fill(pool, key(0)))
    with pytest.raises(RuntimeError, match="listener"):
        pool.clear_cache()
    assert (pool.state(PageId(0)), pool.available_pages, pool.match([key(0)])) == (PageState.FREE, 1, [])


@pytest.mark.parametrize(
    "call",
    [
        lambda pool: pool.begin_fill(PageId(0)),  # sealed
        lambda pool: pool.seal(PageId(0), None),
        lambda pool: pool.abandon(PageId(0)),
        lambda pool: pool.seal(PageId(1), None),  # reserved
        lambda pool: pool.acquire([PageId(1)]),
        lambda pool: pool.release([PageId(1)]),
        lambda pool: pool.begin_fill(PageId(2)),  # free
        lambda pool: pool.abandon(PageId(2)),
        lambda pool: pool.acquire([PageId(2)]),
        lambda pool: pool.release([PageId(2)]),
    ],
)
def test_a_call_that_does_not_fit_the_state_is_refused_and_changes_nothing(call):
    pool = PagePool(3)
    fill(pool, key(0))
    pool.promise(1).take()
    before = [(pool.state(p), pool.readers(p), pool.writers(p), pool.generation(p)) for p in map(PageId, range(3))]
    with pytest.raises(IllegalMove):
        call(pool)
    after = [(pool.state(p), pool.readers(p), pool.writers(p), pool.generation(p)) for p in map(PageId, range(3))]
    assert after == before
    assert pool.match([key(0)]) == [0]


def test_a_second_release_is_refused():
    pool = PagePool(1)
    pages = fill(pool, key(0))
    pool.release(pages)
    with pytest.raises(IllegalMove, match="has no reader"):
        pool.release(pages)
    assert pool.available_pages == 1

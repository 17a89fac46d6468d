"""A tenant's share of a pool: what counts against it, what goes first, and that others keep theirs."""

import random
from collections import Counter

import pytest

from kvstore.keys import PageKey
from kvstore.page_state import PageState
from kvstore.pool import Credit, OutOfPages, PageId, PagePool
from kvstore.quota import OverQuota, Quota
from kvstore.reuse_rate import ReuseRate

ONE, OTHER = (PageKey(bytes([n]) * 16) for n in (1, 2))


def key(tenant: PageKey, n: int) -> PageKey:
    return PageKey(tenant[:8] + n.to_bytes(8, "big"))


def seal(pool: PagePool, credit: Credit, *keys: PageKey) -> list[PageId]:
    pages = []
    for name in keys:
        pages.append(credit.take())
        pool.begin_fill(pages[-1])
        pool.seal(pages[-1], name)
    return pages


def serve(pool: PagePool, quota: Quota | None, *keys: PageKey) -> None:
    """A prompt's life: all its pages are kept for later."""
    pages, credit = pool.admit(keys, len(keys), quota)
    pool.release(reversed(pages + seal(pool, credit, *keys[len(pages) :])))


def held(pool: PagePool, tenant: PageKey, n: int) -> list[int]:
    return [i for i in range(n) if pool.match([key(tenant, i)])]


def test_promised_written_read_and_kept_pages_count():
    pool = PagePool(16)
    quota = pool.quota(ONE, 4)
    credit = pool.promise(3, quota)
    assert (quota.available, pool.available_to(quota), pool.available_pages) == (1, 1, 13)
    pages = seal(pool, credit, key(ONE, 0), key(ONE, 1))
    credit.close()
    assert quota.available == 2
    with pytest.raises(OverQuota, match="2 of the tenant's 4"):
        pool.promise(3, quota)
    pool.release(pages)
    assert (quota.available, quota.pages) == (4, 2)  # kept, as long as nothing else is wanted
    pool.clear_cache()
    assert quota.pages == 0


def test_a_tenant_makes_room_from_its_own_and_from_nobody_elses():
    pool = PagePool(16, policy=ReuseRate(16))
    quota = pool.quota(ONE, 4)
    serve(pool, None, *(key(OTHER, n) for n in range(6)))
    for n in range(5):
        serve(pool, quota, key(ONE, n))
    assert held(pool, ONE, 5) == [1, 2, 3, 4]  # the oldest has gone, though the pool has free pages
    assert held(pool, OTHER, 6) == list(range(6))
    serve(pool, quota, key(ONE, 1))  # read again
    serve(pool, quota, key(ONE, 5))
    assert held(pool, ONE, 6) == [1, 3, 4, 5]
    assert pool.available_pages == 16


def test_the_tail_of_a_prompt_goes_before_its_prefix():
    pool = PagePool(16)
    quota = pool.quota(ONE, 4)
    serve(pool, quota, *(key(ONE, n) for n in range(4)))
    serve(pool, quota, key(ONE, 9))
    assert held(pool, ONE, 10) == [0, 1, 2, 9]


def test_refused_is_who_has_its_share_and_nobody_else():
    pool = PagePool(16)
    quota = pool.quota(ONE, 4)
    credit = pool.promise(4, quota)
    with pytest.raises(OverQuota):
        pool.admit([key(ONE, 0)], 1, quota)
    assert pool.admit([], 12)[1].remaining == 12
    with pytest.raises(OutOfPages) as caught:
        pool.admit([], 1)
    assert caught.type is OutOfPages
    credit.close()
    with pytest.raises(OutOfPages) as caught:
        pool.admit([], 5, quota)
    assert caught.type is OverQuota


def test_reading_what_is_kept_needs_room_in_the_share():
    pool = PagePool(16)
    quota = pool.quota(ONE, 4)
    serve(pool, quota, *(key(ONE, n) for n in range(3)))
    pool.promise(3, quota)
    pages = pool.match([key(ONE, n) for n in range(2)])
    with pytest.raises(OverQuota):
        pool.acquire(pages)
    with pytest.raises(OverQuota):
        pool.admit([key(ONE, 0), key(ONE, 1)], 2, quota)
    pool.acquire(pages[:1])
    assert quota.available == 0


def test_a_page_is_passed_on_between_tenants_within_both_shares():
    pool = PagePool(16)
    one, other = pool.quota(ONE, 4), pool.quota(OTHER, 4)
    lender, borrower, full = pool.promise(3, one), pool.promise(1, other), pool.promise(3, other)
    with pytest.raises(OverQuota):
        borrower.take_over(lender)
    full.close()
    borrower.take_over(lender)
    assert (one.promised, other.promised, lender.remaining, borrower.remaining) == (2, 2, 2, 2)
    borrower.extend(2)
    with pytest.raises(OverQuota):
        borrower.extend(1)
    assert (other.promised, borrower.remaining, pool.available_pages) == (4, 4, 10)


def test_a_share_that_was_lowered_breaks_no_promise():
    pool = PagePool(16)
    credit = pool.promise(4, pool.quota(ONE, 4))
    quota = pool.quota(ONE, 2)
    assert quota.available == -2
    assert len(seal(pool, credit, *(key(ONE, n) for n in range(4)))) == 4
    with pytest.raises(OverQuota):
        pool.promise(1, quota)


@pytest.mark.parametrize("seed", range(20))
def test_shares_hold_over_random_lives(seed):
    draw = random.Random(seed)
    pool = PagePool(24, policy=draw.choice([None, ReuseRate(24)]))
    limits = {ONE: 10, OTHER: 7, PageKey(bytes(16)): 0}
    running: list[tuple[PageKey, Credit, list[PageId]]] = []
    tenant_of: dict[PageId, PageKey] = {}

    for _ in range(400):
        tenant = draw.choice(list(limits))
        quota = pool.quota(tenant, limits[tenant]) if limits[tenant] else None
        act = draw.random()
        if act < 0.4:
            start, count = draw.randrange(6), draw.randrange(5)
            try:
                pages, credit = pool.admit(
                    [key(tenant, n) for n in range(start, start + count)], count + draw.randrange(3), quota
                )
            except OutOfPages:
                continue
            running.append((tenant, credit, pages))
        elif act < 0.8 and running:
            owner, credit, pages = draw.choice(running)
            if credit.remaining:
                pages += seal(pool, credit, key(owner, draw.randrange(9)))  # a promise is kept, whatever else happens
                tenant_of[pages[-1]] = owner
        elif running:
            _, credit, pages = running.pop(draw.randrange(len(running)))
            credit.close()
            pool.release(reversed(pages))

        used = [tenant_of[page] for page in map(PageId, range(24)) if pool.state(page) is not PageState.FREE]
        promised = Counter(owner for owner, credit, _ in running for _ in range(credit.remaining))
        for name, limit in limits.items():
            if limit:
                quota = pool.quota(name, limit)
                unread = sum(
                    pool.state(page) is PageState.SEALED and not pool.readers(page) and tenant_of[page] == name
                    for page in map(PageId, range(24))
                    if page in tenant_of
                )
                assert (quota.pages, quota.promised, len(quota.unread)) == (used.count(name), promised[name], unread)
                assert quota.pages <= limit
                assert quota.available >= 0
        assert pool.available_pages >= 0

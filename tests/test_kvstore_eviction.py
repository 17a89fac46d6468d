"""Eviction policies: what leaves first, and that children leave before their parents."""

import random
from bisect import bisect_right

import pytest

from kvstore.eviction import EvictionPolicy, LeastRecentlyUsed
from kvstore.keys import PageKey
from kvstore.page_state import PageId
from kvstore.pool import PagePool
from kvstore.replay import replay, serve
from kvstore.reuse_rate import ReuseRate

POLICIES = [lambda pages: LeastRecentlyUsed(), ReuseRate]


def key(*path: int) -> PageKey:
    """The key of the block at the end of a path from the root."""
    return PageKey(bytes(path).ljust(16, b"\xff"))


def prompt(*path: int) -> list[PageKey]:
    return [key(*path[: end + 1]) for end in range(len(path))]


@pytest.mark.parametrize("make", POLICIES)
def test_least_recently_used_goes_first_while_nothing_is_known(make):
    policy: EvictionPolicy = make(8)
    for page in range(5):
        policy.add(PageId(page), key(page))
    policy.take(PageId(1))
    policy.add(PageId(1), key(1))
    policy.take(PageId(3))
    assert (len(policy), sorted(policy)) == (4, [0, 1, 2, 4])
    assert [policy.evict() for _ in range(4)] == [0, 2, 4, 1]
    assert len(policy) == 0


class Watched(PagePool):
    """Notes every key that leaves, in order, with what was held just then."""

    def __init__(self, num_pages: int, policy: EvictionPolicy) -> None:
        self.left: list[PageKey] = []
        self.held: set[PageKey] = set()
        super().__init__(num_pages, on_evict=self._gone, policy=policy)

    def _gone(self, gone: PageKey) -> None:
        self.held.discard(gone)
        self.left.append(gone)


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("seed", range(5))
def test_no_page_outlives_its_parent(make, seed):
    draw = random.Random(seed)
    pool = Watched(64, make(64))
    parents: dict[PageKey, PageKey] = {}
    for _ in range(3000):
        # Conversations that go on, begin and fork: low numbers come up often.
        path = prompt(*(min(int(draw.expovariate(0.7)), 9) for _ in range(draw.randint(1, 12))))
        parents.update(zip(path[1:], path, strict=False))
        before = len(pool.left)
        serve(pool, path)
        pool.held.update(path)
        for gone in pool.left[before:]:
            assert not any(parents.get(child) == gone for child in pool.held)
        assert (pool.held_pages, pool.available_pages) == (0, 64)
    assert len(pool.left) > 1000


def test_reuse_rate_keeps_what_comes_back_when_a_flood_of_new_prompts_passes():
    """30 conversations that return every 60 prompts, between prompts of one use that would fill the pool twice."""

    def trace() -> list[list[PageKey]]:
        prompts, fresh = [], 0
        for turn in range(3000):
            if turn % 2:
                prompts.append([PageKey(b"c%3d,%4d" % (turn // 2 % 30, block) + b"\0" * 7) for block in range(10)])
            else:
                fresh += 1
                prompts.append([PageKey(b"%7d,%4d" % (fresh, block) + b"\0" * 4) for block in range(20)])
        return prompts

    rates = {policy: replay(trace(), 450, policy).hit_rate for policy in ("lru", "reuse")}
    assert rates["lru"] == 0.0  # 900 pages pass between two uses
    assert rates["reuse"] > 0.25  # of the third that there is to win


def test_reuse_rate_follows_a_load_that_changes():
    """First what returns is worth keeping; then nothing ever returns, and the newest must win again."""
    policy = ReuseRate(64)
    pool = PagePool(64, policy=policy)
    old = [PageKey(b"old%5d" % block + b"\0" * 8) for block in range(32)]
    for turn in range(200):
        serve(pool, old)
        serve(pool, [PageKey(b"a%7d" % turn + b"\0" * 8)])
    for turn in range(4000):
        serve(pool, [PageKey(b"b%7d" % turn + b"\0" * 8)])
    assert serve(pool, old) == 0


def test_what_is_known_of_pages_that_left_is_bounded():
    policy = ReuseRate(16)
    for number in range(1000):
        policy.add(PageId(number % 16), PageKey(number.to_bytes(16, "little")))
        policy.evict()
    assert len(policy._gone) <= 80
    assert len(policy._waiting) < 20
    assert len(policy) == len(policy._held) == 0


def test_pages_whose_fate_is_not_known_yet_count_among_those_that_grew_so_old():
    """10 pages are read at an age that 54 others have reached too: or these others were read when they were young."""

    def worth_of_the_young(others_wait: bool) -> float:
        policy = ReuseRate(100)
        for number in range(200):
            policy.add(PageId(number), PageKey(number.to_bytes(16, "little")))
            if number >= 64 or (number >= 10 and not others_wait):
                policy.take(PageId(number))
        for number in range(10):
            policy.take(PageId(number))
        policy._reckon()
        return policy._worth[0][bisect_right(policy._ends, 10)]

    assert 0 < worth_of_the_young(others_wait=True) < worth_of_the_young(others_wait=False) / 4

"""Pool, credits and pins against a small model, over random interleavings, with a virtual clock.

The model is written for plainness: lists that are searched, counts that are recomputed. After every step the two
must agree on every page, and the promises of the design must hold.
"""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.keys import PageKey
from kvstore.page_state import IllegalMove, PageState
from kvstore.pins import PinTable
from kvstore.pool import Credit, OutOfPages, PageId, PagePool

FREE, RESERVED, FILLING, SEALED, EVICTING = PageState
KEYS = [PageKey(bytes([n]) * 16) for n in range(6)]
REQUESTS = st.sampled_from(["a", "b", "c"])
OWNERS = st.sampled_from(["r1", "r2"])


@dataclass
class Pin:
    owner: str
    deadline: float
    pages: list[int] = field(default_factory=list)


class Model:
    """What the pool should be."""

    def __init__(self, num_pages: int) -> None:
        self.state = [FREE] * num_pages
        self.generation = [0] * num_pages
        self.key: list[PageKey | None] = [None] * num_pages
        self.free = list(range(num_pages))
        self.cached: list[int] = []  # oldest first
        self.leases: list[int] = []  # one entry for each reader
        self.pins: dict[str, Pin] = {}
        self.credits: list[tuple[Credit, list[int]]] = []  # with what should remain
        self.evicted: list[PageKey] = []

    def readers(self, page: int) -> int:
        return self.leases.count(page) + sum(page in pin.pages for pin in self.pins.values())

    def available(self) -> int:
        return len(self.free) + len(self.cached) - sum(left[0] for _, left in self.credits)

    def match(self, keys: list[PageKey]) -> list[int]:
        pages = []
        for key in keys:
            if key not in self.key:
                break
            pages.append(self.key.index(key))
        return pages

    def forget(self, page: int) -> None:
        if (key := self.key[page]) is not None:
            self.evicted.append(key)
            self.key[page] = None

    def to_free(self, page: int) -> None:
        self.forget(page)
        self.state[page] = FREE
        self.generation[page] += 1
        self.free.append(page)

    def take(self) -> int:
        if not self.free:
            self.to_free(self.cached.pop(0))
        page = self.free.pop(0)
        self.state[page] = RESERVED
        return page

    def reading(self, pages: list[int]) -> None:
        self.cached = [page for page in self.cached if page not in pages]

    def read_no_more(self, pages: list[int]) -> None:
        """Call after the lease is gone."""
        for page in pages:
            if self.readers(page):
                continue
            if self.key[page] is None:
                self.to_free(page)
            else:
                self.cached.append(page)

    def drop(self, requests: list[str]) -> None:
        for request in requests:
            self.read_no_more(self.pins.pop(request).pages[::-1])


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(1, 8))
    def begin(self, num_pages: int) -> None:
        self.generations = [0] * num_pages
        self.evicted: list[PageKey] = []
        self.pool = PagePool(num_pages, self.generations, self.evicted.append)
        self.pins = PinTable(self.pool)
        self.model = Model(num_pages)
        self.now = 0.0

    def pages_in(self, *states: PageState) -> list[PageId]:
        return [PageId(page) for page, state in enumerate(self.model.state) if state in states]

    # Writers.

    @rule(data=st.data())
    def promise(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, self.model.available() + 1))
        if n > self.model.available():
            with pytest.raises(OutOfPages):
                self.pool.promise(n)
        else:
            self.model.credits.append((self.pool.promise(n), [n]))

    @precondition(lambda self: self.model.credits)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        credit, left = data.draw(st.sampled_from(self.model.credits))
        if left[0]:
            left[0] -= 1
            assert credit.take() == self.model.take()
        else:
            with pytest.raises(IllegalMove):
                credit.take()

    @precondition(lambda self: self.model.credits)
    @rule(data=st.data())
    def take_over(self, data: st.DataObject) -> None:
        to, gained = data.draw(st.sampled_from(self.model.credits))
        of, left = data.draw(st.sampled_from(self.model.credits))
        if left[0]:
            to.take_over(of)
            left[0] -= 1
            gained[0] += 1
        else:
            with pytest.raises(IllegalMove):
                to.take_over(of)

    @precondition(lambda self: self.model.credits)
    @rule(data=st.data())
    def close_credit(self, data: st.DataObject) -> None:
        credit, left = data.draw(st.sampled_from(self.model.credits))
        credit.close()
        left[0] = 0

    @precondition(lambda self: self.pages_in(RESERVED))
    @rule(data=st.data())
    def begin_fill(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages_in(RESERVED)))
        self.pool.begin_fill(page)
        self.model.state[page] = FILLING

    @precondition(lambda self: self.pages_in(FILLING))
    @rule(data=st.data(), key=st.none() | st.sampled_from(KEYS))
    def seal(self, data: st.DataObject, key: PageKey | None) -> None:
        page = data.draw(st.sampled_from(self.pages_in(FILLING)))
        first = key is not None and key not in self.model.key
        assert self.pool.seal(page, key) == first
        self.model.state[page] = SEALED
        self.model.leases.append(page)
        if first:
            self.model.key[page] = key

    @precondition(lambda self: self.pages_in(RESERVED, FILLING))
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages_in(RESERVED, FILLING)))
        self.pool.abandon(page)
        self.model.to_free(page)

    @rule(start=st.integers(0, 5), n=st.integers(1, 4), n_released=st.integers(0, 4))
    def write_a_sequence(self, start: int, n: int, n_released: int) -> None:
        """What a request does from end to end: single steps alone seldom come this far."""
        n = min(n, self.model.available())
        credit, pages = self.pool.promise(n), []
        for key in (KEYS + KEYS)[start : start + n]:
            page = credit.take()
            assert page == self.model.take()
            self.pool.begin_fill(page)
            assert self.pool.seal(page, key) == (key not in self.model.key)
            self.model.state[page] = SEALED
            if key not in self.model.key:
                self.model.key[page] = key
            pages.append(page)
        self.model.leases += pages
        for page in pages[::-1][:n_released]:
            self.pool.release([page])
            self.model.leases.remove(page)
            self.model.read_no_more([page])

    # Readers.

    @precondition(lambda self: self.pages_in(SEALED))
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        # Twice the cached ones: they are the ones that cost something.
        pages = data.draw(st.lists(st.sampled_from(self.pages_in(SEALED) + self.model.cached), max_size=4))
        if len(set(pages) & set(self.model.cached)) > self.model.available():
            with pytest.raises(OutOfPages):
                self.pool.acquire(pages)
        else:
            self.pool.acquire(pages)
            self.model.leases += pages
            self.model.reading(pages)

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.model.leases))
        self.pool.release([page])
        self.model.leases.remove(page)
        self.model.read_no_more([page])

    @rule(data=st.data(), n_keys=st.integers(0, 4))
    def admit(self, data: st.DataObject, n_keys: int) -> None:
        known = [n for n, key in enumerate(KEYS) if key in self.model.key]
        start = data.draw(st.sampled_from(known or [0]))
        keys = (KEYS + KEYS)[start : start + n_keys]
        more = data.draw(st.integers(0, self.model.available() + 1))
        matched = self.model.match(keys)
        rest = len(keys) + more - len(matched)
        if rest + len(set(matched) & set(self.model.cached)) > self.model.available():
            with pytest.raises(OutOfPages):
                self.pool.admit(keys, len(keys) + more)
            return
        pages, credit = self.pool.admit(keys, len(keys) + more)
        assert pages == matched
        self.model.leases += matched
        self.model.reading(matched)
        self.model.credits.append((credit, [rest]))

    @precondition(lambda self: len(self.model.cached) > 2)  # or it would seldom find much
    @rule()
    def clear_cache(self) -> None:
        self.pool.clear_cache()
        for page in self.model.cached:
            self.model.to_free(page)
        self.model.cached = []
        for page in range(len(self.model.key)):
            self.model.forget(page)

    # Pins.

    @rule(data=st.data(), request=REQUESTS, owner=OWNERS, seconds=st.integers(0, 20))
    def hold(self, data: st.DataObject, request: str, owner: str, seconds: int) -> None:
        sealed = self.pages_in(SEALED)
        pages = data.draw(st.lists(st.sampled_from(sealed), max_size=3)) if sealed else []
        pin = self.model.pins.get(request)
        new = [page for page in dict.fromkeys(pages) if pin is None or page not in pin.pages]
        if len(set(new) & set(self.model.cached)) > self.model.available():
            with pytest.raises(OutOfPages):
                self.pins.hold(request, owner, pages, self.now + seconds)
            return
        self.pins.hold(request, owner, pages, self.now + seconds)
        self.model.pins[request] = Pin(owner, self.now + seconds, (pin.pages if pin else []) + new)
        self.model.reading(new)

    @rule(request=REQUESTS)
    def release_pin(self, request: str) -> None:
        self.pins.release(request)
        self.model.drop([request] if request in self.model.pins else [])

    @rule(owner=OWNERS)
    def drop_owner(self, owner: str) -> None:
        gone = [request for request, pin in self.model.pins.items() if pin.owner == owner]
        assert self.pins.drop_owner(owner) == gone
        self.model.drop(gone)

    @rule(seconds=st.integers(0, 15))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        gone = [request for request, pin in self.model.pins.items() if pin.deadline <= self.now]
        assert self.pins.expire(self.now) == gone
        self.model.drop(gone)

    # Callers that make mistakes.

    @rule(data=st.data(), key=st.none() | st.sampled_from(KEYS))
    def mistakes_change_nothing(self, data: st.DataObject, key: PageKey | None) -> None:
        page = data.draw(st.sampled_from([PageId(page) for page in range(len(self.model.state))]))
        state = self.model.state[page]
        wrong = {
            "begin_fill": state is not RESERVED and (lambda: self.pool.begin_fill(page)),
            "seal": state is not FILLING and (lambda: self.pool.seal(page, key)),
            "abandon": state not in (RESERVED, FILLING) and (lambda: self.pool.abandon(page)),
            "acquire": state is not SEALED and (lambda: self.pool.acquire([page])),
            "release": not self.model.readers(page) and (lambda: self.pool.release([page])),
        }
        for call in filter(None, wrong.values()):
            with pytest.raises(IllegalMove):
                call()

    # What must be true after every step.

    @invariant()
    def every_page_is_as_the_model_says(self) -> None:
        for page, state in enumerate(self.model.state):
            found = self.pool.state(PageId(page)), self.pool.readers(PageId(page)), self.pool.writers(PageId(page))
            assert found == (state, self.model.readers(page), int(state in (RESERVED, FILLING)))
        assert sorted(self.evicted) == sorted(self.model.evicted)  # clear_cache has no order

    @invariant()
    def generations_rise_with_each_return_to_free_and_only_then(self) -> None:
        assert self.generations == self.model.generation

    @invariant()
    def pages_are_conserved(self) -> None:
        held = [page for page in self.model_pages() if self.pool.readers(page) or self.pool.writers(page)]
        assert self.pool.held_pages == len(held)
        assert not set(held) & {*self.model.free, *self.model.cached}
        assert len(held) + len(self.model.free) + len(self.model.cached) == self.pool.total_pages
        assert max(Counter([*self.model.free, *self.model.cached]).values(), default=1) == 1

    @invariant()
    def promises_can_be_kept(self) -> None:
        promised = sum(credit.remaining for credit, _ in self.model.credits)
        assert [credit.remaining for credit, _ in self.model.credits] == [left[0] for _, left in self.model.credits]
        assert promised <= len(self.model.free) + len(self.model.cached)
        assert self.pool.available_pages == self.model.available() >= 0

    @invariant()
    def the_index_names_each_sealed_page_at_most_once(self) -> None:
        found = {key: self.pool.match([key]) for key in KEYS}
        assert found == {key: self.model.match([key]) for key in KEYS}
        pages = [page for match in found.values() for page in match]
        assert len(pages) == len(set(pages))
        assert all(self.pool.state(page) is SEALED for page in pages)

    @invariant()
    def pins_agree(self) -> None:
        assert len(self.pins) == len(self.model.pins)

    def model_pages(self) -> list[PageId]:
        return [PageId(page) for page in range(self.pool.total_pages)]

    def teardown(self) -> None:
        """When all is given back nothing is held, whatever came before."""
        for credit, _ in self.model.credits:
            while credit.remaining:
                self.pool.abandon(credit.take())  # every promise is kept to the end
        for page in self.model_pages():
            if self.pool.writers(page):
                self.pool.abandon(page)
        self.pool.release(self.model.leases)
        self.pins.expire(float("inf"))
        assert self.pool.held_pages == 0
        assert self.pool.available_pages == self.pool.total_pages


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)

"""Which page is in which tier: children leave before their parents, and what is told is what is so."""

import random
from dataclasses import replace

import pytest

from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.tiers.demotion import Demotion
from kvstore.tiers.ledger import Ledger


class Store:
    """A ledger without bytes, and what it has told."""

    def __init__(self, host: int, disk: int = 0) -> None:
        self.now = 0.0
        self.told: dict[PageKey, Lineage] = {}
        self.left: list[PageKey] = []
        self.ledger = Ledger(host, [0] * host, disk, self._arrive, self._leave, lambda: self.now)

    def _arrive(self, lineage: Lineage) -> None:
        assert lineage.key not in self.told
        self.told[lineage.key] = lineage

    def _leave(self, key: PageKey) -> None:
        del self.told[key]
        self.left.append(key)

    def bring(self, *lineages: Lineage) -> None:
        """As far as there is room."""
        for lineage in lineages:
            for page in self.ledger.reserve([lineage.key]).values():
                self.ledger.arrive(lineage, page)

    def quiet(self) -> None:
        """Every prompt is let go."""
        self.now += 10
        self.ledger.let_go_quiet()

    def write_all(self) -> list[Demotion]:
        """What a demoter does."""
        done = []
        while demotion := self.ledger.next_demotion():
            if demotion.page is not None:
                self.ledger.make_disk_room()
                self.ledger.on_disk(demotion.lineage)
            done.append(demotion)
        return done

    def locate(self, *lineages: Lineage) -> int:
        """What a promoter does; pages found."""
        run = self.ledger.begin_run([lineage.key for lineage in lineages])
        while room := self.ledger.room_for(run, 2):
            for index in room:
                self.ledger.promoted(run, index, run.lineages[index])
        return len(self.ledger.end_run(run))

    def held(self) -> int:
        return self.ledger._pool.held_pages


def prompt(name: int, pages: int, after: tuple[Lineage, ...] = ()) -> tuple[Lineage, ...]:
    """`after`, and so many pages behind it."""
    chain = list(after)
    for number in range(len(after), len(after) + pages):
        key = PageKey(bytes([name, number]) * 8)
        chain.append(Lineage(key, chain[0].key if chain else key, chain[-1].key if chain else None))
    return tuple(chain)


def keys(lineages) -> list[PageKey]:
    return [lineage.key for lineage in lineages]


def test_what_is_held_is_not_asked_for_again_and_a_page_without_its_parent_is_not_kept():
    store = Store(8)
    one = prompt(1, 4)
    store.bring(*one[:2], one[3])
    assert list(store.told) == keys(one[:2])
    assert list(store.ledger.reserve(keys(one))) == keys(one[2:])


def test_a_page_that_came_twice_at_once_is_kept_once():
    store = Store(8)
    [first] = prompt(1, 1)
    rooms = [store.ledger.reserve([first.key])[first.key] for _ in range(2)]
    for page in rooms:
        store.ledger.arrive(first, page)
    store.quiet()
    assert store.ledger.host == (8, 1)
    assert store.ledger.counters().arrived == 1
    assert store.held() == 0


def test_the_prompt_that_was_used_longest_ago_leaves_first_and_tail_first():
    store = Store(9)
    one, two = prompt(1, 4), prompt(2, 4)
    store.bring(*one[:2], *two[:2])  # in chunks, and by turns
    store.bring(*two[2:])
    store.bring(*one[2:])
    store.quiet()
    store.bring(*prompt(3, 7))
    assert store.left == [*reversed(keys(two)), *reversed(keys(one[2:]))]


def test_a_prefix_stays_as_long_as_prompts_go_on_from_it():
    store = Store(6)
    prefix = prompt(1, 2)
    store.bring(*prefix)
    store.quiet()
    for name in range(2, 30):
        store.bring(*prompt(name, 2, prefix))
        store.quiet()
    assert set(keys(prefix)) <= store.told.keys()
    assert store.ledger.host == (6, 6)


def test_prompts_that_grow_are_no_hindrance_and_more_than_fits_is_left_out():
    store = Store(4)
    store.bring(*prompt(1, 4))  # grows still
    two = prompt(2, 6)
    store.bring(*two)
    assert list(store.told) == keys(two[:3])  # of use without the rest; the fourth left for its own children
    assert store.left[:4] == list(reversed(keys(prompt(1, 4))))
    store.quiet()
    assert store.held() == 0


@pytest.mark.parametrize("seed", range(5))
def test_children_leave_before_their_parents(seed):
    """Prompts branch off one another, are computed in chunks by turns, located now and then; the pool is too small."""
    draw = random.Random(seed)
    store = Store(24)
    known: list[tuple[Lineage, ...]] = [prompt(0, 3)]
    growing: list[tuple[Lineage, ...]] = []
    for step in range(600):
        store.now += draw.random()
        store.ledger.let_go_quiet()
        if len(growing) < 3 and len(known) < 250:
            base = draw.choice(known)
            growing.append(prompt(len(known), draw.randint(1, 6), base[: draw.randint(0, len(base))]))
            known.append(growing[-1])
        mine = draw.choice(growing or known)
        before = len(store.left)
        store.bring(*mine[: draw.randint(1, len(mine))])
        store.locate(*draw.choice(known))
        if mine in growing and draw.random() < 0.3:
            growing.remove(mine)
        for key in store.left[before:]:
            assert not [lineage for lineage in store.told.values() if lineage.parent == key], f"step {step}"
    assert len(store.left) > 300
    store.quiet()
    assert store.held() == 0


@pytest.mark.parametrize("seed", range(5))
def test_with_a_disk_what_is_told_is_what_is_in_a_tier_and_nothing_stays_held(seed):
    draw = random.Random(seed)
    store = Store(8, disk=20)
    ledger = store.ledger
    known = [prompt(name, draw.randint(1, 6)) for name in range(40)]
    for _ in range(500):
        store.now += draw.random()
        ledger.let_go_quiet()
        store.bring(*draw.choice(known))
        match draw.randrange(4):
            case 0:
                store.write_all()
            case 1:
                one = draw.choice(known)
                assert store.locate(*one) <= len(one)
            case 2 if len(ledger._disk):
                ledger.off_disk(draw.choice(list(ledger._disk)))
        assert store.told.keys() == set(ledger._pool._index) | set(ledger._disk)
        assert ledger._lineages == store.told
        assert ledger.host[1] == len(ledger._pool._index)
    store.quiet()
    assert store.held() == 0


def test_what_is_let_go_is_due_for_the_disk_tail_first_and_once():
    store = Store(8, disk=8)
    one = prompt(1, 3)
    store.bring(*one)
    assert store.write_all() == []  # it grows still
    store.quiet()
    assert [d.lineage for d in store.write_all()] == list(reversed(one))
    store.bring(*prompt(2, 1, one))
    store.quiet()
    assert [(d.lineage.key, d.page is None) for d in store.write_all()] == [
        (prompt(2, 1, one)[3].key, False),
        *((key, True) for key in reversed(keys(one))),  # they are there: only that they were used is noted
    ]


def test_what_left_the_host_before_it_was_written_is_gone():
    store = Store(2, disk=8)
    store.bring(*prompt(1, 2))
    store.quiet()
    store.bring(*prompt(2, 2))
    assert store.write_all() == []
    assert sorted(store.left) == sorted(keys(prompt(1, 2)))


def test_what_is_on_the_disk_outlives_its_place_in_the_host_and_comes_back():
    store = Store(3, disk=8)
    one = prompt(1, 3)
    store.bring(*one)
    store.quiet()
    store.write_all()
    store.bring(*prompt(2, 3))
    store.quiet()
    assert store.left == []
    assert (store.ledger.host, store.ledger.disk) == ((3, 3), (8, 3))
    assert store.locate(*one) == 3
    assert store.ledger.counters().promoted == 3
    assert store.ledger.counters().hits == 3
    assert store.left == list(reversed(keys(prompt(2, 3))))  # those were not written yet


def test_the_disk_gives_up_tails_first():
    store = Store(9, disk=4)
    for name in (1, 2):
        store.bring(*prompt(name, 3))
        store.quiet()
        store.write_all()
    assert set(store.ledger._disk) == {prompt(1, 1)[0].key, *keys(prompt(2, 3))}
    assert store.left == []  # they are in the host as well


def test_two_who_bring_the_same_page_from_the_disk_at_once():
    store = Store(6, disk=4)
    one = prompt(1, 2)
    for lineage in one:
        store.ledger.on_disk(lineage)
    runs = [store.ledger.begin_run(keys(one)) for _ in range(2)]
    for run in runs:
        assert len(store.ledger.room_for(run, 9)) == 2
    for run in runs:
        for index in (0, 1):
            store.ledger.promoted(run, index, one[index])
    assert store.ledger.end_run(runs[0]) == store.ledger.end_run(runs[1])
    assert store.ledger.counters().promoted == 2
    assert store.held() == 0


def test_a_run_ends_where_a_page_could_not_be_brought():
    store = Store(6, disk=4)
    one = prompt(1, 3)
    for lineage in one:
        store.ledger.on_disk(lineage)
    run = store.ledger.begin_run(keys(one))
    assert list(store.ledger.room_for(run, 9)) == [0, 1, 2]
    store.ledger.promoted(run, 0, one[0])
    store.ledger.promoted(run, 2, one[2])
    assert len(store.ledger.end_run(run)) == 1
    assert store.held() == 0


def test_a_checksum_is_that_of_the_bytes_in_the_host():
    """Two workers may compute a page to other last bits: here one wrote it to the disk, the other brings it anew."""
    [one], store = prompt(1, 1), Store(1, disk=4)
    brought, written = replace(one, checksum=11), replace(one, checksum=22)
    store.bring(brought)
    store.ledger.on_disk(written)  # found by a scan

    def located() -> list[Lineage]:
        run = store.ledger.begin_run([one.key])
        for index in store.ledger.room_for(run, 1):
            store.ledger.promoted(run, index, written)
        return [page.lineage for page in store.ledger.end_run(run)]

    assert located() == [brought]
    store.quiet()
    store.bring(*prompt(2, 1))
    store.quiet()
    assert located() == [written]

"""Host and disk together, with real memory, files and threads: the right bytes, or none."""

import time
from collections.abc import Callable

import pytest

from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.segment import Segment
from kvstore.tiers import demoter, ledger
from kvstore.tiers.page_files import PageFiles
from kvstore.tiers.page_tiers import PageTiers
from kvstore_owner import SMALL, random_page

PATIENCE_S = 20.0
DISK = 1 << 20


def prompt(name: int, pages: int) -> list[Lineage]:
    keys = [PageKey(bytes([name, number]) * 8) for number in range(pages)]
    return [Lineage(key, keys[0], keys[i - 1] if i else None, 2**63 + seed_of(key)) for i, key in enumerate(keys)]


def seed_of(key: PageKey) -> int:
    return key[0] * 256 + key[1]


class Tiers(PageTiers):
    """With its own segment, and pages that come from nowhere."""

    def __init__(self, folder=None, host: int = 8, disk_bytes: int = DISK) -> None:
        self.closed = False
        self.told: set[PageKey] = set()
        files = PageFiles(folder, SMALL) if folder else None
        segment = Segment.create(SMALL, host, incarnation=1)
        super().__init__(segment, files, disk_bytes, lambda page: self.told.add(page.key), self.told.remove)
        self.start()

    def bring(self, *lineages: Lineage) -> None:
        for lineage in lineages:
            [page] = self.ledger.reserve([lineage.key]).values()
            self.segment.pages[page] = random_page(seed_of(lineage.key), SMALL)
            self.ledger.arrive(lineage, page)

    def found(self, lineages: list[Lineage], timeout_s: float = PATIENCE_S) -> int:
        """How many of these pages are located; each has its own bytes."""
        pages = self.locate([lineage.key for lineage in lineages], timeout_s)
        for lineage, found in zip(lineages, pages, strict=False):
            assert found.lineage == lineage
            assert self.segment.generations[found.page] == found.generation
            assert (self.segment.pages[found.page] == random_page(seed_of(lineage.key), SMALL)).all()
        return len(pages)

    def close(self) -> None:
        """May be called again."""
        if not self.closed:
            super().close()
            self.segment.close()
        self.closed = True


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(ledger, "_QUIET_S", 0.01)
    monkeypatch.setattr(demoter, "_PERIOD_S", 0.01)


@pytest.fixture
def make(tmp_path):
    made: list[Tiers] = []

    def make(folder=tmp_path, **options) -> Tiers:
        made.append(Tiers(folder, **options))
        return made[-1]

    yield make
    for tiers in made:
        tiers.close()


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def demoted(tiers: Tiers, count: int) -> bool:
    return eventually(lambda: tiers.ledger.counters().demoted >= count)


def paths(folder, lineages: list[Lineage]) -> list:
    return [folder / page.key.hex()[:2] / f"{page.key.hex()}.page" for page in lineages]


def test_without_a_disk_the_host_alone_serves(make):
    tiers = make(folder=None)
    tiers.bring(*prompt(1, 4))
    assert tiers.found(prompt(1, 6)) == 4
    assert tiers.found(prompt(2, 3)) == 0
    assert tiers.ledger.disk == (0, 0)


def test_pages_go_to_the_disk_before_their_room_is_taken_and_come_back(make):
    tiers = make()
    tiers.bring(*prompt(1, 5))
    assert demoted(tiers, 5)
    tiers.bring(*prompt(2, 8))
    assert demoted(tiers, 13)
    assert tiers.ledger.host == (8, 8)
    assert tiers.found(prompt(1, 5)) == 5
    assert tiers.found(prompt(2, 8)) == 8
    counters = tiers.ledger.counters()
    assert counters.promoted >= 5
    assert (counters.dropped, counters.dropped_corrupt, counters.disk_errors) == (0, 0, 0)
    assert tiers.told == {page.key for page in prompt(1, 5) + prompt(2, 8)}


def test_a_new_process_finds_what_is_on_the_disk(make, tmp_path):
    tiers = make()
    tiers.bring(*prompt(1, 5), *prompt(2, 2))
    assert demoted(tiers, 7)
    tiers.close()
    again = make()
    assert eventually(lambda: len(again.told) == 7)
    assert again.ledger.host == (8, 0)
    assert again.found(prompt(1, 5)) == 5
    assert again.found(prompt(2, 2)) == 2
    again.bring(Lineage(PageKey(bytes(16)), prompt(2, 1)[0].key, prompt(2, 2)[1].key))  # its lineage is known as well
    assert again.ledger.counters().arrived == 1


@pytest.mark.parametrize("harm", ["a byte", "cut short", "gone", "another's"])
def test_a_page_that_is_not_whole_is_never_served_and_counted(make, tmp_path, harm):
    tiers = make()
    tiers.bring(*prompt(1, 4), *prompt(2, 1))
    assert demoted(tiers, 5)
    tiers.bring(*prompt(3, 8))  # all others are on the disk alone
    path, other = paths(tmp_path, [prompt(1, 4)[2], prompt(2, 1)[0]])
    match harm:
        case "a byte":
            data = bytearray(path.read_bytes())
            data[2000] ^= 1
            path.write_bytes(data)
        case "cut short":
            path.write_bytes(path.read_bytes()[:3000])
        case "gone":
            path.unlink()
        case "another's":
            path.write_bytes(other.read_bytes())
    assert tiers.found(prompt(1, 4)) == 2
    assert tiers.ledger.counters().dropped_corrupt == 1
    assert prompt(1, 4)[2].key not in tiers.told
    assert not path.exists()
    assert tiers.found(prompt(2, 1)) == 1
    tiers.bring(prompt(1, 4)[2])  # computed again
    assert tiers.found(prompt(1, 4)) == 4


def test_the_disk_keeps_to_its_capacity_and_gives_up_tails_first(make, tmp_path):
    tiers = make(disk_bytes=6 * 5000)  # a file has 4212 bytes: 7 of them
    for name in (1, 2, 3):
        tiers.bring(*prompt(name, 3))
        assert demoted(tiers, 3 * name)
    files = sorted(path.name for path in tmp_path.rglob("*.page"))
    kept = [prompt(1, 1)[0], *prompt(2, 3), *prompt(3, 3)]
    assert files == sorted(path.name for path in paths(tmp_path, kept))
    assert tiers.ledger.disk == (7, 7)


def test_a_disk_that_takes_nothing_is_counted_and_the_host_goes_on(make, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    tiers = make()
    monkeypatch.setattr(PageFiles, "write", full)
    tiers.bring(*prompt(1, 4))
    assert eventually(lambda: tiers.ledger.counters().disk_errors == 4)
    assert tiers.found(prompt(1, 4)) == 4
    assert caplog.text.count("the disk takes no pages") == 1
    monkeypatch.undo()
    assert eventually(lambda: tiers.found(prompt(1, 4)) == 4 and tiers.ledger.counters().demoted == 4)  # as it is used


def test_where_time_is_short_what_has_come_by_then_is_located_and_nothing_stays_held(make, monkeypatch):
    tiers = make()
    tiers.bring(*prompt(1, 8))
    assert demoted(tiers, 8)
    tiers.bring(*prompt(2, 8))
    read, begun = PageFiles.read, []

    def slow(self, key, into) -> Lineage:
        begun.append(key)
        time.sleep(0.3)
        return read(self, key, into)

    monkeypatch.setattr(PageFiles, "read", slow)
    assert tiers.found(prompt(1, 8), timeout_s=0.1) == len(begun) < 8  # the others were not waited for
    monkeypatch.undo()
    assert eventually(lambda: tiers.ledger._pool.held_pages == 0)
    assert tiers.found(prompt(1, 8)) == 8


def test_a_page_that_is_evicted_while_it_is_copied_for_the_disk_is_not_written(make, monkeypatch):
    tiers = make(host=1)
    written = []
    monkeypatch.setattr(PageFiles, "write", lambda self, lineage, page, stamp: written.append(bytes(page)))
    read_generation = type(tiers.ledger).next_demotion

    def evict_behind_it(self):
        demotion = read_generation(self)
        if demotion is not None and demotion.lineage in prompt(1, 1):
            tiers.bring(*prompt(2, 1))
        return demotion

    monkeypatch.setattr(type(tiers.ledger), "next_demotion", evict_behind_it)
    tiers.bring(*prompt(1, 1))
    assert demoted(tiers, 1)
    assert written == [random_page(seed_of(prompt(2, 1)[0].key), SMALL).tobytes()]
    assert tiers.told == {prompt(2, 1)[0].key}

"""Who sits in which row, and when rows move."""

import random

import pytest

from engine.seating import Seating, graph_sizes


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, [1]),
        (12, [1, 2, 4, 8, 12]),
        (64, [1, 2, 4, 8, 16, 24, 32, 48, 64]),
        (400, [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 400]),
    ],
)
def test_graph_sizes_end_with_the_rows_there_are(rows, sizes):
    assert graph_sizes(rows) == sizes


def test_the_lowest_free_row_is_taken():
    seating = Seating(8)
    seating.seat("abcd")
    changes = seating.seat("acd")
    assert changes.emptied == [1]
    assert changes.moved == []
    changes = seating.seat("acdx")
    assert (changes.emptied, changes.moved) == ([], [])
    assert [seating.row(s) for s in "axcd"] == [0, 1, 2, 3]


def test_a_row_that_is_taken_over_at_once_is_not_emptied():
    seating = Seating(8)
    seating.seat("ab")
    assert seating.seat("xb").emptied == []
    assert seating.row("x") == 0


def test_rows_move_only_where_a_smaller_graph_then_holds_them():
    seating = Seating(8)
    seating.seat("abcdef")
    assert seating.size == 8
    assert seating.seat("acdef").moved == []  # five still need the graph of eight
    changes = seating.seat("aef")
    assert sorted(changes.moved) == [(4, 1), (5, 2)]
    assert sorted(changes.emptied) == [3, 4, 5]
    assert seating.size == 4


@pytest.mark.parametrize("seed", range(3))
def test_content_follows_its_sequence(seed):
    """What a device would hold, if it did what it is told."""
    rng = random.Random(seed)
    seating, content = Seating(20), [None] * 20
    for _ in range(200):
        wanted = rng.sample(range(40), rng.randrange(21))
        known = {name for name in wanted if name in seating}
        changes = seating.seat(wanted)
        for (_, to), moved in zip(changes.moved, [content[source] for source, _ in changes.moved], strict=True):
            content[to] = moved
        for row in changes.emptied:
            content[row] = None
        for name in wanted:
            if name in known:
                assert content[seating.row(name)] == name
            content[seating.row(name)] = name
        assert {name for name in content if name is not None} == set(wanted)
        assert seating.size == next(size for size in seating.sizes if size >= len(wanted))

"""The table of moves."""

from kvstore.page_state import MOVES, PageState

FREE, RESERVED, FILLING, SEALED, EVICTING = PageState


def test_the_moves_are_these_and_no_others():
    assert {state: set(to) for state, to in MOVES.items()} == {
        FREE: {RESERVED},
        RESERVED: {FILLING, FREE},
        FILLING: {SEALED, FREE},
        SEALED: {EVICTING},
        EVICTING: {FREE},
    }

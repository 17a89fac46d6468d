"""How long answers are expected to get."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.answer_lengths import AnswerLengths

SHARES = [(2 * n + 1) / 40 for n in range(20)]


def mean(lengths, answered, most) -> float:
    return sum(lengths.expected(answered, most, share) for share in SHARES) / len(SHARES)


def test_before_anything_is_known_an_answer_gets_as_long_as_it_may():
    lengths = AnswerLengths()
    for answered, most in ((0, 4096), (100, 4096), (0, 1), (7, 8)):
        assert lengths.expected(answered, most, 0.1) == most


def test_answers_of_one_length_are_soon_expected():
    lengths = AnswerLengths()
    for _ in range(300):
        lengths.note(100, ended=True)
    for share in SHARES:
        assert lengths.expected(0, 4096, share) == pytest.approx(100, rel=0.25)
        assert lengths.expected(50, 4096, share) == pytest.approx(100, rel=0.25)
        assert lengths.expected(0, 30, share) == 30


def test_one_that_outlives_all_others_may_go_on_to_its_end():
    lengths = AnswerLengths()
    for _ in range(300):
        lengths.note(100, ended=True)
    assert lengths.expected(200, 4096, 0.5) == 4096


def test_answers_that_were_cut_off_do_not_count_as_short():
    """Half of all answers may have 16 tokens; the others end at 200 in the mean, and so would those."""
    rng, lengths = random.Random(1), AnswerLengths()
    for _ in range(4000):
        length, most = 1 + int(rng.expovariate(1 / 200)), rng.choice([16, 4096])
        lengths.note(min(length, most), ended=length < most)
    for share in (0.25, 0.5, 0.75):
        expected = -200 * math.log(1 - share)
        assert lengths.expected(0, 4096, share) == pytest.approx(expected, rel=0.25)
        assert lengths.expected(300, 4096, share) - 300 == pytest.approx(expected, rel=0.35)  # it has no memory


def test_where_all_are_cut_off_they_are_expected_to_be():
    lengths = AnswerLengths()
    for _ in range(300):
        lengths.note(256, ended=False)
    assert lengths.expected(0, 256, 0.1) == 256


def test_what_was_seen_long_ago_fades():
    lengths = AnswerLengths()
    for length in [1000] * 2000 + [50] * 2000:
        lengths.note(length, ended=True)
    assert mean(lengths, 0, 4096) < 150


@given(
    notes=st.lists(st.tuples(st.integers(1, 10**6), st.booleans()), max_size=40),
    answered=st.integers(0, 10**6),
    share=st.floats(0.001, 1.0),
    rest=st.integers(0, 2**31 - 1 - 10**6),
)
def test_expected_is_more_than_there_is_and_at_most_what_may_be(notes, answered, share, rest):
    lengths = AnswerLengths()
    for length, ended in notes:
        lengths.note(length, ended)
    expected = lengths.expected(answered, answered + rest, share)
    assert answered + min(1, rest) <= expected <= answered + rest

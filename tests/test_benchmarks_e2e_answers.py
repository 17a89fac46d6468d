"""How answers are compared: what is let pass, and what is not."""

import pytest

from benchmarks.e2e_answers import Answer, compare, distance
from benchmarks.gpu_e2e import failures
from protos.v1.common_pb2 import TokenLogprobs


def place(**likeliest: float) -> TokenLogprobs:
    """Tokens t1, t2, ... with their log-probabilities, the likeliest first; that one was chosen."""
    ids = [int(name[1:]) for name in likeliest]
    values = list(likeliest.values())
    return TokenLogprobs(token_id=ids[0], logprob=values[0], top_ids=ids, top_logprobs=values)


def answer(*places: TokenLogprobs) -> dict[str, Answer]:
    return {"a": Answer(tuple(p.token_id for p in places), places)}


def test_equal_answers_are_apart_by_their_numbers_alone():
    found = compare(answer(place(t1=-1.0, t2=-2.0)), answer(place(t1=-1.25, t2=-2.0)), 0.5)
    assert (found["prompts_with_equal_tokens"], found["places_compared"]) == (1, 1)
    assert found["largest_logprob_difference"] == 0.25
    assert found["within_bound"]


def test_a_choice_between_near_equals_may_differ_and_ends_the_comparison():
    ones = answer(place(t5=-1.0), place(t1=-1.0, t2=-1.125), place(t9=-1.0))
    others = answer(place(t5=-1.0), place(t2=-1.0, t1=-1.125), place(t8=-7.0))
    found = compare(ones, others, 0.25)
    assert found["places_compared"] == 2
    assert found["within_bound"]
    assert found["differing"] == [{"prompt": "a", "place": 1, "tokens": [1, 2], "preferred_by": [0.125, 0.125]}]


def test_a_choice_that_the_other_side_finds_unlikely_is_out_of_bounds():
    one, other = place(t1=-1.0, t2=-1.5), place(t3=-1.0, t2=-1.5)
    assert distance(one, other) == float("inf")
    assert not compare(answer(one), answer(other), 0.25)["within_bound"]


@pytest.mark.parametrize(("apart", "control", "wrong"), [(0.1, 0.9, 0), (0.3, 0.9, 1), (0.1, 0.2, 1), (0.3, 0.2, 2)])
def test_a_run_fails_where_answers_are_apart_or_the_control_sees_nothing(apart, control, wrong):
    found = compare(answer(place(t1=-1.0)), answer(place(t1=-1.0 - apart)), 0.25)
    assert len(failures({"split_and_colocated": found, "control_wrong_page": control})) == wrong

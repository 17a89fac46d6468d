"""Each transform on vectors small enough to check by hand."""

import math

import pytest
import torch

from engine.logit_transforms import (
    add_bias,
    completing,
    enough,
    forbid,
    ids_of_largest,
    min_p_count,
    penalise_counts,
    penalise_repetition,
    top_p_count,
    weigh,
)

INF = math.inf


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_bias_is_added():
    assert add_bias(vector(1, 2, 3, -INF), [(3, 5.0), (0, -1.5)]).tolist() == [-0.5, 2, 3, -INF]


def test_what_is_forbidden_is_impossible():
    assert forbid(vector(1, 2, 3), [2, 0]).tolist() == [-INF, 2, -INF]
    assert forbid(vector(1, 2, 3), []).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "forbidden"),
    [
        ([9], [7]),  # a run of one id always completes
        ([1], [7, 2]),
        ([1, 2], [7, 3]),
        ([2], [7]),
        ([5, 1, 2], [7, 3]),
        ([1, 2, 1], [7, 2]),
        ([1, 2, 3], [7]),
        ([1, 1, 2], [7, 3, 8]),
    ],
)
def test_the_id_that_would_complete_a_run_is_found(tokens, forbidden):
    assert completing([(7,), (1, 2), (1, 2, 3), (1, 1, 2, 8)], tokens) == forbidden


def test_a_run_longer_than_the_tokens_completes_nothing():
    assert completing([(1, 2, 3)], [2]) == []
    assert completing([(1, 2, 3)], [1, 2]) == [3]


def test_repetition_divides_what_is_positive_and_multiplies_what_is_negative():
    logits = vector(4, -4, 0, 3, -INF)
    assert penalise_repetition(logits, [0, 1, 2, 4, 0], 2.0).tolist() == [2, -8, 0, 3, -INF]
    assert penalise_repetition(logits, [0, 1], 0.5).tolist() == [8, -2, 0, 3, -INF]


def test_frequency_counts_and_presence_does_not():
    logits = vector(1, 1, 1, -INF)
    assert penalise_counts(logits, [0, 2, 2, 2, 3], 0.5, 0.25).tolist() == [0.25, 1, -0.75, -INF]
    assert penalise_counts(logits, [0, 2, 2], -1.0, 0.0).tolist() == [2, 1, 3, -INF]
    assert penalise_counts(logits, [0, 2, 2], 0.0, 2.0).tolist() == [-1, 1, -1, -INF]


def test_temperature():
    weights = weigh(vector(math.log(8), math.log(2), -INF, math.log(8)), 1.0)
    assert weights.tolist() == pytest.approx([1, 0.25, 0, 1])
    assert weigh(vector(math.log(8), math.log(2)), 0.5).tolist() == pytest.approx([1, 0.0625])
    assert weigh(vector(math.log(8), math.log(2)), 2.0).tolist() == pytest.approx([1, 0.5])


@pytest.mark.parametrize(
    ("share", "count"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.876, 4), (1.0, 4), (1e-9, 1)]
)
def test_top_p_takes_the_fewest_that_reach_the_mass(share, count):
    weights = vector(8, 4, 2, 2)
    assert top_p_count(weights, share * weights.double().sum()) == count


def test_min_p_is_a_share_of_the_largest():
    weights = vector(1, 0.5, 0.5, 0.25, 0)
    assert [min_p_count(weights, share) for share in (0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 1.0)] == [5, 4, 4, 3, 3, 1, 1]


@pytest.mark.parametrize(
    ("count", "ids"), [(1, [1]), (2, [1, 4]), (3, [0, 1, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 3, 4, 5]), (6, None)]
)
def test_of_equals_the_lowest_ids_are_taken(count, ids):
    logits = vector(2, 5, 1, 2, 5, 2)
    least = logits.sort(descending=True).values[count - 1]
    assert ids_of_largest(logits, least, count).tolist() == (ids or [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 8.0])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.9999])
def test_enough_are_looked_at_and_in_order(spread, share):
    """Flat distributions need thousands, steep ones few."""
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * spread
    weights = weigh(logits, 0.7).double()
    largest = enough(logits, 0.7, share * weights.sum())
    assert largest.equal(logits.sort(descending=True).values[: len(largest)])
    assert weights.sort(descending=True).values[: len(largest)].sum() >= share * weights.sum() * (1 - 1e-9)


def test_arguments_stay_as_they_are():
    logits, tokens = torch.arange(8.0), [1, 2, 2]
    add_bias(logits, [(1, 1.0)])
    forbid(logits, [1])
    penalise_repetition(logits, tokens, 2.0)
    penalise_counts(logits, tokens, 1.0, 1.0)
    weigh(logits, 0.5)
    enough(logits, 1.0, torch.tensor(1.0).double())
    ids_of_largest(logits, logits[5], 3)
    assert logits.equal(torch.arange(8.0))
    assert tokens == [1, 2, 2]

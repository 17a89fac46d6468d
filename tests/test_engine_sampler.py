"""Sampled ids follow the exact distribution, and depend on nothing but their own row."""

import random

import pytest
import torch

from engine.sampler import SamplingBatch, sample
from engine.sampling_params import SamplingParams


def exact(logits, params):
    """By definition, in float64: the probability of each id."""
    probabilities = torch.softmax(logits.double() / params.temperature, -1)
    order = probabilities.argsort(descending=True, stable=True)
    kept = order[: params.top_k] if params.top_k else order
    mass = probabilities[kept].cumsum(0)
    before = mass - probabilities[kept]
    kept = kept[before < params.top_p * mass[-1] - 1e-12]
    out = torch.zeros_like(probabilities)
    out[kept] = probabilities[kept]
    return out / out.sum()


def draws(logits, params, count, seed=0):
    """`count` ids of the same logits, at positions 0, 1, 2 ..."""
    rows = SamplingBatch([params] * count, positions=range(seed * count, (seed + 1) * count))
    return sample(logits.expand(count, -1), rows)


def p_value_is_fair(counts, probabilities):
    """Pearson's chi-square against a bound that a fair sample exceeds about once in 10,000 runs."""
    total = counts.sum()
    expected = probabilities * total
    rare = expected < 5  # pooled, as the test asks
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(counts) - 1
    if degrees == 0:
        return True
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    bound = degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3  # Wilson and Hilferty
    return chi_square < bound


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 1000, "top_p": 0.99},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution(settings):
    torch.manual_seed(1)
    logits = torch.randn(50) * 2
    params = SamplingParams(**settings, seed=12345)
    counts = torch.bincount(draws(logits, params, 10_000), minlength=50)
    probabilities = exact(logits, params)
    assert set(counts.nonzero()[:, 0].tolist()) <= set(probabilities.nonzero()[:, 0].tolist())
    assert p_value_is_fair(counts, probabilities)


def test_the_distribution_test_can_fail():
    torch.manual_seed(1)
    logits = torch.randn(50) * 2
    counts = torch.bincount(draws(logits, SamplingParams(temperature=1.0), 10_000), minlength=50)
    assert not p_value_is_fair(counts, exact(logits, SamplingParams(temperature=1.1)))


@pytest.mark.parametrize("top_k", [0, 3, 200, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.9999])
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_kept_ids_over_a_real_vocabulary(top_k, top_p, spread):
    """Flat distributions need thousands of candidates, steep ones few: the set of kept ids is exact in both."""
    torch.manual_seed(2)
    logits = torch.randn(20_000) * spread
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, seed=3)
    probabilities = exact(logits, params)
    ids = draws(logits, params, 60)
    assert (probabilities[ids] > 0).all()
    kept = int((probabilities > 0).sum())
    if kept <= 3:
        assert set(draws(logits, params, 200).tolist()) == set(probabilities.nonzero()[:, 0].tolist())


def test_mean_of_a_flat_distribution():
    """Every id can be reached, first and last alike."""
    logits = torch.zeros(8)
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.999999)):
        counts = torch.bincount(draws(logits, params, 4000), minlength=8)
        assert p_value_is_fair(counts, torch.full((8,), 1 / 8))


def test_greedy_rows_take_the_largest():
    torch.manual_seed(3)
    logits = torch.randn(5, 1000)
    rows = SamplingBatch([SamplingParams()] * 5, positions=range(5))
    assert sample(logits, rows).tolist() == logits.argmax(-1).tolist()
    assert sample(logits, rows).dtype == torch.int64


def test_a_row_does_not_see_the_others():
    torch.manual_seed(4)
    rng = random.Random(4)
    logits = torch.randn(40, 3000) * 3
    params = [SamplingParams(**rng.choice([{}, *SETTINGS]), seed=rng.randrange(2**64)) for _ in range(40)]
    positions = [rng.randrange(10_000) for _ in range(40)]
    together = sample(logits, SamplingBatch(params, positions)).tolist()
    alone = [int(sample(logits[i : i + 1], SamplingBatch([params[i]], [positions[i]]))) for i in range(40)]
    assert together == alone
    order = rng.sample(range(40), 40)
    shuffled = sample(logits[order], SamplingBatch([params[i] for i in order], [positions[i] for i in order]))
    assert shuffled.tolist() == [together[i] for i in order]


def test_seed_and_position_change_the_draw():
    logits = torch.zeros(1000)
    one = draws(logits, SamplingParams(temperature=1.0, seed=1), 50).tolist()
    assert one == draws(logits, SamplingParams(temperature=1.0, seed=1), 50).tolist()
    assert one != draws(logits, SamplingParams(temperature=1.0, seed=2), 50).tolist()
    assert one != draws(logits, SamplingParams(temperature=1.0, seed=2**63 + 1), 50).tolist()
    assert len(set(one)) > 30


def test_extreme_logits():
    """Impossible ids are never drawn, and neither large logits nor low temperatures overflow."""
    logits = torch.full((100,), float("-inf"))
    logits[[7, 70]] = torch.tensor([1e4, 1e4])
    for settings in ({}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.5}):
        for temperature in (2e-5, 1.0, 2.0):
            ids = set(draws(logits, SamplingParams(temperature=temperature, **settings), 40).tolist())
            assert ids <= {7, 70}
    logits[7] = 1e4 + 1
    assert set(draws(logits, SamplingParams(temperature=0.01), 40).tolist()) == {7}

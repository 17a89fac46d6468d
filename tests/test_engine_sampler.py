"""Sampled ids follow the exact distribution, and depend on nothing but their own row."""

import math
import random

import pytest
import torch

import sampling_oracle
from engine.resident_sampling import Kind, ResidentSampling
from engine.sampler import sample
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from kernels import philox
from kvstore.keys import PageKey
from sampling_oracle import random_case

PROMPT = [3, 9, 9, 27]
DRAWS = 20_000


def row(params, tokens=PROMPT, prompt_len=4, ends=()):
    return Sequence("r", tokens, prompt_len, 10**9, params, frozenset(ends), [], PageKey(bytes(16)))


def draws(logits, params, count, seed=0):
    """`count` ids of the same logits, at positions 1, 2, 3 ..."""
    first = 1 + seed * count
    return sample(logits.expand(count, -1), [row(params, range(n), n) for n in range(first, first + count)])


def exact(logits, params):
    return torch.tensor(sampling_oracle.probabilities(logits.double().tolist(), params))


def p_value_is_fair(counts, probabilities):
    """Pearson's chi-square against a bound that a fair sample exceeds about once in 10,000 runs."""
    if counts[probabilities == 0].any():
        return False
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
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1000, "top_p": 0.99},
]
CHANGES = [
    {"logit_bias": ((3, 2.5), (40, -100.0), (49, 1.0))},
    {"bad_tokens": ((3,), (9, 27, 11), (27, 12), (8, 27, 13))},
    {"min_tokens": 6},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"frequency_penalty": 0.9},
    {"presence_penalty": -1.5},
    {
        "logit_bias": ((3, 1.5), (27, -0.5)),
        "bad_tokens": ((4,), (5, 6)),
        "min_tokens": 9,
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.3,
        "presence_penalty": 0.8,
    },
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution(settings):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    params = SamplingParams(**settings, seed=12345)
    counts = torch.bincount(draws(logits, params, DRAWS), minlength=50)
    assert p_value_is_fair(counts, exact(logits, params))


def test_the_distribution_test_can_fail():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    counts = torch.bincount(draws(logits, SamplingParams(temperature=1.0), DRAWS), minlength=50)
    assert p_value_is_fair(counts, exact(logits, SamplingParams(temperature=1.0)))
    assert not p_value_is_fair(counts, exact(logits, SamplingParams(temperature=1.1)))
    assert not p_value_is_fair(counts, exact(logits, SamplingParams(temperature=1.0, min_p=0.01)))


@pytest.mark.parametrize("settings", CHANGES, ids=str)
def test_distribution_of_changed_logits(settings):
    """Seeds differ where positions cannot: the answer is part of what changes the logits."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2)) * 2
    logits[[0, 2, 3, 11, 12]] += 4
    answer, ends = [5, 5, 5, 9, 27], (0, 2)
    rows = [
        row(SamplingParams(temperature=1.0, **settings, seed=seed), [*PROMPT, *answer], ends=ends)
        for seed in range(DRAWS // 2)
    ]
    changed = sampling_oracle.changed(logits.double().tolist(), rows[0].sampling, PROMPT, answer, ends)
    probabilities = torch.tensor(sampling_oracle.probabilities(changed, rows[0].sampling))
    counts = torch.bincount(sample(logits.expand(len(rows), -1), rows), minlength=50)
    assert p_value_is_fair(counts, probabilities)
    assert not p_value_is_fair(counts, exact(logits, SamplingParams(temperature=1.0)))


def test_ids_are_those_of_the_rules():
    """Random settings of all kinds together: the very id that the oracle draws, number by number."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    borderline = 0
    for _ in range(1500):
        vocab = rng.choice([8, 40, 300])
        logits = torch.randn(vocab, generator=generator) * rng.choice([0.5, 2, 6])
        if rng.random() < 0.3:
            logits = logits.round()  # ties
        params, prompt, answer, ends = random_case(rng, vocab)
        changed = sampling_oracle.changed(logits.tolist(), params, prompt, answer, ends)
        changed = torch.tensor(changed).tolist()  # rounded as ours are, so that ties are the same
        number = philox.uniform(params.seed, len(prompt) + len(answer))
        wanted, margin = sampling_oracle.drawn(sampling_oracle.probabilities(changed, params), number)
        token = int(sample(logits[None], [row(params, [*prompt, *answer], len(prompt), ends)]))
        if token != wanted:
            assert margin < 1e-5
            borderline += 1
    assert borderline <= 2


def test_the_devices_sampler_gives_the_same_ids():
    """Both at once: `kernels.sample` as the GPU's runner fills it, on a CPU."""
    rng, generator = random.Random(6), torch.Generator().manual_seed(6)
    different = 0
    for vocab in (8, 300, 3000):
        logits = torch.randn(300, vocab, generator=generator) * 3
        rows = []
        for _ in range(300):
            params, prompt, answer, ends = random_case(rng, vocab)
            rows.append(row(params, [*prompt, *answer], len(prompt), ends))
        device = ResidentSampling(len(rows), vocab, torch.device("cpu"))
        for index, one in enumerate(rows):
            device.fill(index, one)
        device.flush()
        positions = torch.tensor([len(one.tokens) for one in rows])
        theirs = device.sample(logits.clone(), torch.arange(len(rows)), positions, Kind.EDITED)
        different += int((theirs != sample(logits, rows)).sum())
    assert different <= 1  # of 900: both round, and a number may fall on a border


@pytest.mark.parametrize("top_k", [0, 3, 200, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.9999])
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_kept_ids_over_a_real_vocabulary(top_k, top_p, spread):
    """Flat distributions need thousands of candidates, steep ones few: the set of kept ids is exact in both."""
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(2)) * spread
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, seed=3)
    ranked = logits.argsort(descending=True, stable=True)[: top_k or None]
    mass = logits[ranked].double().softmax(-1).cumsum(0)
    kept = ranked[: int((mass < top_p * mass[-1] - 1e-12).sum()) + 1]
    ids = draws(logits, params, 60)
    assert set(ids.tolist()) <= set(kept.tolist())
    if len(kept) <= 3:
        assert set(draws(logits, params, 200).tolist()) == set(kept.tolist())


def test_mean_of_a_flat_distribution():
    """Every id can be reached, first and last alike."""
    logits = torch.zeros(8)
    for settings in ({}, {"top_p": 0.999999}, {"top_k": 8}, {"min_p": 1.0}):
        counts = torch.bincount(draws(logits, SamplingParams(temperature=1.0, **settings), 4000), minlength=8)
        assert p_value_is_fair(counts, torch.full((8,), 1 / 8))


def test_of_equals_the_lowest_ids_are_kept():
    logits = torch.zeros(1000)
    for settings, last in (({"top_k": 10}, 9), ({"top_p": 0.02}, 19), ({"top_k": 100, "top_p": 0.05}, 4)):
        ids = draws(logits, SamplingParams(temperature=1.0, **settings), 400)
        assert (ids.min(), ids.max()) == (0, last)
    assert sample(logits[None], [row(SamplingParams())]).tolist() == [0]


def test_a_lower_number_draws_a_lower_id():
    """The cumulative distribution runs over ids in order, not over probabilities."""
    logits = torch.randn(64, generator=torch.Generator().manual_seed(7))
    for settings in ({}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}):
        params = SamplingParams(temperature=1.0, seed=5, **settings)
        ids = draws(logits, params, 300).tolist()
        numbers = [philox.uniform(5, position) for position in range(1, 301)]
        assert [token for _, token in sorted(zip(numbers, ids, strict=True))] == sorted(ids)


def test_greedy_rows_take_the_largest():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(3))
    ids = sample(logits, [row(SamplingParams())] * 5)
    assert ids.tolist() == logits.argmax(-1).tolist()
    assert ids.dtype == torch.int64


def test_greedy_rows_take_the_largest_of_changed_logits():
    logits = torch.tensor([[1.0, 5.0, 4.0, 3.0]])

    def answer(tokens=(0,), prompt_len=1, ends=(), **settings):
        return int(sample(logits, [row(SamplingParams(**settings), list(tokens), prompt_len, ends)]))

    assert answer(logit_bias=((3, 2.5),)) == 3
    assert answer(bad_tokens=((1,),)) == 2
    assert answer(tokens=(0, 2), bad_tokens=((2, 1), (0, 2, 2))) == 3
    assert answer(repetition_penalty=1.3, tokens=(1,)) == 2  # of the prompt
    assert answer(frequency_penalty=2.0, tokens=(1,)) == 1  # not of the prompt
    assert answer(frequency_penalty=2.0, tokens=(0, 1)) == 2
    assert answer(presence_penalty=1.5, tokens=(0, 1)) == 2
    assert answer(min_tokens=1, ends=(1, 100_000)) == 2
    assert answer(min_tokens=2, ends=(1, 2), tokens=(0, 0)) == 3
    assert answer(min_tokens=1, ends=(1,), tokens=(0, 0)) == 1


def test_what_is_forbidden_is_never_drawn():
    """Whatever the penalties and the temperature: they leave an impossible token impossible."""
    logits = torch.zeros(6)
    params = {"temperature": 2.0, "repetition_penalty": 0.1, "frequency_penalty": -2.0, "bad_tokens": ((3,), (4,))}
    rows = [row(SamplingParams(**params, min_tokens=9, seed=s), [3, 3, 0], 1, ends=(0,)) for s in range(2000)]
    assert set(sample(logits.expand(2000, -1), rows).tolist()) == {1, 2, 5}


def test_a_row_does_not_see_the_others():
    rng = random.Random(4)
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(4)) * 3
    rows = [
        row(
            SamplingParams(**rng.choice([{}, *SETTINGS]) | rng.choice([{}, *CHANGES]), seed=rng.randrange(2**64)),
            [rng.randrange(3000) for _ in range(rng.randrange(4, 300))],
            ends=(7,),
        )
        for _ in range(40)
    ]
    before = logits.clone()
    together = sample(logits, rows).tolist()
    assert logits.equal(before)
    assert together == [int(sample(logits[i : i + 1], [rows[i]])) for i in range(40)]
    order = rng.sample(range(40), 40)
    assert sample(logits[order], [rows[i] for i in order]).tolist() == [together[i] for i in order]


def test_seed_and_position_change_the_draw():
    logits = torch.zeros(1000)
    one = draws(logits, SamplingParams(temperature=1.0, seed=1), 50).tolist()
    assert one == draws(logits, SamplingParams(temperature=1.0, seed=1), 50).tolist()
    assert one != draws(logits, SamplingParams(temperature=1.0, seed=2), 50).tolist()
    assert one != draws(logits, SamplingParams(temperature=1.0, seed=2**63 + 1), 50).tolist()
    assert len(set(one)) > 30


def test_extreme_logits():
    """Impossible ids are never drawn, and neither large logits nor low temperatures overflow."""
    logits = torch.full((100,), -math.inf)
    logits[[7, 70]] = torch.tensor([1e4, 1e4])
    for settings in ({}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.5}, {"min_p": 0.5}):
        for temperature in (2e-5, 1.0, 2.0):
            ids = set(draws(logits, SamplingParams(temperature=temperature, **settings), 40).tolist())
            assert ids <= {7, 70}
    logits[7] = 1e4 + 1
    assert set(draws(logits, SamplingParams(temperature=0.01), 40).tolist()) == {7}

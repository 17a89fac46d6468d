"""Philox gives the words of Random123's reference implementation, for whole numbers and for tensors."""

import random

import pytest
import torch

from kernels.philox import philox4x32, uniform

# kat_vectors of Random123 1.14, "philox 4x32 10": counter, key, words
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers(counter, key, expected):
    assert list(philox4x32(*words(counter), *words(key))) == words(expected)


def test_known_answers_of_tensors():
    inputs = torch.tensor([words(f"{counter} {key}") for counter, key, _ in VECTORS])
    out = torch.stack(philox4x32(*inputs.unbind(1)), dim=1)
    assert out.tolist() == [words(expected) for _, _, expected in VECTORS]


def test_uniform_is_the_first_53_bits():
    counter_of_3 = philox4x32(3, 0, 0, 0, 5, 1)
    expected = ((counter_of_3[0] >> 5) * 2**26 + (counter_of_3[1] >> 6)) / 2**53
    assert uniform(2**32 + 5, 3) == expected


def test_numbers_and_tensors_agree():
    rng = random.Random(9)
    seeds = [0, 2**64 - 1, 2**63, 2**63 - 1, *(rng.randrange(2**64) for _ in range(60))]
    positions = [rng.randrange(2**40) for _ in seeds]
    signed = torch.tensor([seed - (seed >> 63 << 64) for seed in seeds])
    numbers = uniform(signed, torch.tensor(positions))
    assert numbers.dtype == torch.float64
    assert numbers.tolist() == [uniform(seed, position) for seed, position in zip(seeds, positions, strict=True)]


def test_uniform_looks_uniform():
    """Over positions of one seed and over seeds at one position: chi-square over 100 cells, 99 degrees of freedom."""
    count = 100_000
    for seeds, positions in (
        (torch.full((count,), 1234), torch.arange(count)),
        (torch.arange(count), torch.full((count,), 17)),
    ):
        numbers = uniform(seeds, positions)
        assert 0.0 <= numbers.min() <= numbers.max() < 1.0
        cells = torch.histc(numbers, bins=100, min=0.0, max=1.0)
        chi_square = ((cells - count / 100) ** 2 / (count / 100)).sum().item()
        assert 50 < chi_square < 160  # outside with a probability of 1 in 10,000
        neighbours = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1].item()
        assert abs(neighbours) < 0.015

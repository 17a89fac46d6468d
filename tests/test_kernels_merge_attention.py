"""Two parts of a context join to what one softmax over both would give."""

import pytest
import torch

from kernels.merge_attention import merge_attention


def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, values = torch.randn(5, 2, 30, dtype=torch.float64) * 4, torch.randn(30, 8, dtype=torch.float64)
    split = [(scores[..., part].softmax(-1) @ values[part], scores[..., part].logsumexp(-1)) for part in PARTS]
    return (*(t.float() for pair in split for t in pair), scores.softmax(-1) @ values, scores.logsumexp(-1))


PARTS = (slice(0, 11), slice(11, 30))


def test_joins_to_one_softmax():
    first, first_lse, second, second_lse, expected, expected_lse = parts()
    lse = torch.empty(5, 2)
    out = merge_attention(first, first_lse, second, second_lse, torch.float32, lse)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=1e-6)
    assert merge_attention(first, first_lse, second, second_lse, torch.bfloat16).dtype == torch.bfloat16


def test_empty_parts_count_for_nothing_whatever_they_hold():
    first, first_lse, second, second_lse, _, _ = parts()
    first_lse[0], second_lse[1] = -torch.inf, -torch.inf
    first_lse[2], second_lse[2] = -torch.inf, -torch.inf
    first[0], second[1], first[2], second[2] = torch.nan, torch.nan, torch.inf, torch.nan
    lse = torch.empty(5, 2)
    out = merge_attention(first, first_lse, second, second_lse, torch.float32, lse)
    assert torch.equal(out[0], second[0])
    assert torch.equal(out[1], first[1])
    assert not out[2].any()
    assert torch.equal(lse[0], second_lse[0])
    assert torch.isneginf(lse[2]).all()
    assert not out.isnan().any()


def test_sums_that_overflow_without_the_maximum_taken_off():
    first, first_lse, second, second_lse, expected, expected_lse = parts()
    lse = torch.empty(5, 2)
    out = merge_attention(first, first_lse + 4000, second, second_lse + 4000, torch.float32, lse)
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double() - 4000, expected_lse, atol=1e-3, rtol=1e-3)


def test_rows_beyond_the_first_parts_are_not_looked_at():
    first, first_lse, second, second_lse, expected, _ = parts()
    out = merge_attention(first[:3], first_lse[:3], second, second_lse, torch.float32)
    torch.testing.assert_close(out.double(), expected[:3], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"first": torch.zeros(5, 16)}, "first must"),
        ({"second": torch.zeros(5, 3, 8)}, "second must"),
        ({"second": torch.zeros(4, 2, 8), "second_lse": torch.zeros(4, 2)}, "second has 4"),
        ({"first_lse": torch.zeros(2, 5)}, "first_lse"),
        ({"second_lse": torch.zeros(5, 2).double()}, "second_lse"),
        ({"lse": torch.zeros(5)}, "lse must"),
    ],
)
def test_wrong_arguments_are_named(change, name):
    first, first_lse, second, second_lse, _, _ = parts()
    arguments = {"first": first, "first_lse": first_lse, "second": second, "second_lse": second_lse} | change
    with pytest.raises(ValueError, match=name):
        merge_attention(**arguments, dtype=torch.float32)

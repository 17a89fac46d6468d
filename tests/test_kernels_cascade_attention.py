"""Attention over a prefix that is read once equals attention over each whole context."""

import pytest
import torch

from kernels.cascade_attention import cascade_attention
from kernels_oracle import make_case, with_shared_prefix


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("prefix", [0, 16, 96])
def test_equals_attention_over_each_context(prefix, queries, soft_cap):
    case = with_shared_prefix(make_case([99, 100, 130, 177], [queries] * 4), prefix)
    lse = torch.full(case.q.shape[:2], torch.nan)
    out = cascade_attention(case.q, case.cache, 1, case.plan(queries), prefix, lse, soft_cap=soft_cap)
    expected, expected_lse = case.expected(1, soft_cap=soft_cap)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse.double(), expected_lse, atol=3e-6, rtol=3e-6)


def test_half_width_pages():
    case = with_shared_prefix(make_case([99, 100, 177], [1, 1, 1], dtype=torch.bfloat16), 96)
    out = cascade_attention(case.q, case.cache, 1, case.plan(), 96)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), case.expected(1)[0], atol=8e-3, rtol=8e-3)


def test_a_plan_serves_all_layers():
    case = with_shared_prefix(make_case([99, 100, 177], [1, 1, 1]), 32)
    plan = case.plan()
    for layer in range(3):
        out = cascade_attention(case.q, case.cache, layer, plan, 32)
        torch.testing.assert_close(out.double(), case.expected(layer)[0], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (40, "multiple of the page size"),
        (-16, "multiple of the page size"),
        (48, "do not begin with the same pages"),
        (96, "does not go beyond it"),
    ],
)
def test_a_wrong_prefix_is_refused(prefix, words):
    case = with_shared_prefix(make_case([97, 100, 177], [2] * 3), 32)
    with pytest.raises(ValueError, match=f"prefix {prefix}.*{words}"):
        cascade_attention(case.q, case.cache, 1, case.plan(2), prefix)


def test_other_wrong_arguments_are_named():
    case = with_shared_prefix(make_case([97, 100, 177], [1] * 3), 32)
    with pytest.raises(ValueError, match="q must be"):
        cascade_attention(case.q[:2], case.cache, 1, case.plan(), 32)
    with pytest.raises(ValueError, match="soft_cap"):
        cascade_attention(case.q, case.cache, 1, case.plan(), 32, soft_cap=-1.0)
    with pytest.raises(ValueError, match="lse"):
        cascade_attention(case.q, case.cache, 1, case.plan(), 32, torch.empty(3, 3))

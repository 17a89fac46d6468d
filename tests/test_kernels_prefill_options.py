"""Prefill attention with a sliding window, a soft-cap on its scores, or both, equals the textbook in float64."""

import pytest
import torch

from kernels.prefill_attention import prefill_attention
from kernels_oracle import make_case

PAGE = 16
CONTEXTS = [PAGE, PAGE + 1, 200, 90, 333]
CHUNKS = [PAGE, 3, 200, 70, 130]


def close(case, window, soft_cap, tolerance=3e-6):
    lse = torch.full(case.q.shape[:2], torch.nan)
    out = prefill_attention(case.q, case.cache, 1, case.plan(), lse, window=window, soft_cap=soft_cap)
    expected, expected_lse = case.expected(1, window, soft_cap)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("window", [0, 1, 2, PAGE - 1, PAGE, PAGE + 1, 63, 64, 65, 130, 332, 333, 10**6])
def test_windows(window, soft_cap):
    close(make_case(CONTEXTS, CHUNKS), window, soft_cap)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (28, 4), (8, 1)])
def test_groups(heads, kv_heads):
    close(make_case([70, 40], [70, 9], heads=heads, kv_heads=kv_heads), 20, 5.0)


@pytest.mark.parametrize("scale", [0.01, 300.0])
def test_scores_far_below_and_above_the_cap(scale):
    close(make_case(CONTEXTS, CHUNKS, scale=scale), 0, 30.0, tolerance=1e-4)


@pytest.mark.parametrize("window", [20, 64])
def test_pages_before_the_window_are_not_read(window):
    case = make_case([333, 90], [70, 40])
    expected = case.expected(1, window)[0]
    for row, context, chunk in zip(case.page_table, case.contexts, case.queries, strict=True):
        case.cache[row[: max(context - chunk + 1 - window, 0) // PAGE].long()] = torch.nan
    out = prefill_attention(case.q, case.cache, 1, case.plan(), window=window)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=3e-6)


def test_after_decodes():
    case = make_case([20, 33, 90, 50], [1, 1, 70, 9])
    out = prefill_attention(case.q[2:], case.cache, 1, case.plan(), window=33)
    torch.testing.assert_close(out.double(), case.expected(1, 33)[0][2:], atol=3e-6, rtol=3e-6)


def test_one_plan_serves_layers_with_and_without_a_window():
    case = make_case(CONTEXTS, CHUNKS)
    plan = case.plan()
    for window in (0, 40, 0, 100):
        out = prefill_attention(case.q, case.cache, 1, plan, window=window)
        torch.testing.assert_close(out.double(), case.expected(1, window)[0], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(
    "options",
    [{"window": -1}, {"soft_cap": -1.0}, {"soft_cap": float("nan")}, {"soft_cap": float("inf")}],
)
def test_an_option_out_of_range_is_named(options):
    case = make_case([40, 20], [40, 20])
    with pytest.raises(ValueError, match=next(iter(options))):
        prefill_attention(case.q, case.cache, 0, case.plan(), **options)

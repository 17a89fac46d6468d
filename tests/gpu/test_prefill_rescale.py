"""Prefill's running maximum, which moves only when a score is far over it: scores that rise, fall and jump along the
keys, in the order of the steps (from the newest keys to the oldest), alike or not for the rows of a tile."""

import math

import pytest
import torch

from attention_cases import Case, attend, error, make_case
from kernels.capability import is_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")]

# Octaves that the scores of a step's keys lie above those of the first, by the step's number. The maximum moves by more
# than 8 at once, or not at all.
LEVELS = {
    "rise": lambda step: 9 * step,
    "rise slowly": lambda step: 3 * step,
    "fall": lambda step: -9 * step,
    "jump": lambda step: 12 * (step >= 2),
    "jump below the threshold": lambda step: 5 * (step >= 2),
    "up and down": lambda step: 12 * (step % 2) + 4 * (step // 2),
}
# Of each row, how much of that it sees: no row of its warp's 16 or of its tile need be like another.
ROWS = {
    "all": lambda row: torch.ones_like(row),
    "one of 16": lambda row: (row % 16 == 5).float(),
    "one of 128": lambda row: (row % 128 == 77).float(),
    "every other": lambda row: (row % 2).float(),
    "different": lambda row: (row * 37 % 101) / 100 * 2 - 1,
}
# head_dim, page size, queries, context: two groups, but for the second.
SHAPES = [(64, 64, 330, 1100), (64, 16, 330, 4000), (96, 64, 330, 1100), (128, 64, 513, 1100), (256, 64, 330, 600)]


def levelled(shape, level, of_row, dtype=torch.bfloat16) -> Case:
    """One sequence whose scores follow `level` along its keys, as far as `of_row` says, and vary a little besides."""
    d, page_size, queries, context = shape
    case = make_case([queries], [context], d=d, page_size=page_size, dtype=dtype, seed=queries)
    keys = 64 if d == 256 else 128  # of a step
    key = torch.arange(context, device="cuda")
    step = (context - 1) // keys - key // keys
    octaves = torch.tensor([float(level(int(n))) for n in range(int(step.max()) + 1)], device="cuda")[step]
    pages = case.plan.page_table[0, key // page_size].long()
    case.cache[pages, case.layer, 0, :, key % page_size, 0] = octaves[:, None].to(dtype)
    case.q *= 0.3
    row = torch.arange(queries, device="cuda")
    case.q[:, :, 0] = (of_row(row) * d**0.5 / math.log2(math.e))[:, None].to(dtype)
    return case


def check(case, window=0, soft_cap=0.0):
    from kernels.hopper_prefill import prefill_attention_hopper

    lse = torch.full(case.q.shape[:2], float("nan"), device="cuda")
    out = prefill_attention_hopper(case.q, case.cache, case.layer, case.plan, lse, window=window, soft_cap=soft_cap)
    reference, reference_lse = attend(case, torch.float32, window, soft_cap)
    # A soft-cap's tanh is good to 11 bits: at a cap of 30 a score is off by .015, and so is the log of its weight.
    near, nearest, lse_near = (3e-2, 1.5e-2, 2e-2) if soft_cap else (1e-2, 4e-3, 1e-3)
    assert error(out, reference) < nearest
    by_row = (out.double() - reference).norm(dim=2) / reference.norm(dim=2)
    assert by_row.max() < near  # one wrong row shows
    torch.testing.assert_close(lse, reference_lse, atol=lse_near, rtol=0.0)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_levels(shape, level, rows):
    check(levelled(shape, LEVELS[level], ROWS[rows]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3]], ids=str)
def test_float16(shape, level):
    for of_row in ROWS.values():
        check(levelled(shape, LEVELS[level], of_row, torch.float16))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_and_caps(shape, level):
    for of_row in (ROWS["all"], ROWS["different"]):
        case = levelled(shape, LEVELS[level], of_row)
        check(case, window=200)
        check(case, soft_cap=30.0)

"""Where each row's newest token stands, and the step to the next one."""

import pytest
import torch

from kernels.resident_rows import advance_rows, row_places

I32, I64 = torch.int32, torch.int64


def test_places_of_seated_and_empty_rows():
    table = torch.tensor([[7, 3, 9], [4, 0, 0], [8, 8, 8], [5, 6, 0]], dtype=I32)
    positions, slots = row_places(torch.tensor([9, 4, 0, 5], dtype=I32), table, 4)
    assert positions.tolist() == [8, 3, 0, 4]
    assert slots.tolist() == [9 * 4 + 0, 4 * 4 + 3, -1, 6 * 4 + 0]
    assert positions.dtype == slots.dtype == I64


def test_only_seated_rows_go_on():
    tokens, lengths = torch.tensor([10, 20, 30]), torch.tensor([3, 0, 1], dtype=I32)
    advance_rows(tokens, lengths, torch.tensor([11, 21, 31]))
    assert tokens.tolist() == [11, 20, 31]
    assert lengths.tolist() == [4, 0, 2]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"context_lens": torch.zeros(2, dtype=I64)}, "context_lens"),
        ({"context_lens": torch.zeros(3, dtype=I32)}, "page_table has 2 rows"),
        ({"page_table": torch.zeros(2, 2)}, "page_table"),
        ({"page_table": torch.zeros(4, 2, dtype=I32).t()}, "page_table"),
    ],
)
def test_wrong_arguments_of_places_are_named(changes, name):
    arguments = {"context_lens": torch.zeros(2, dtype=I32), "page_table": torch.zeros(2, 4, dtype=I32), "page_size": 4}
    with pytest.raises(ValueError, match=name):
        row_places(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"token_ids": torch.zeros(2, dtype=I32)}, "token_ids"),
        ({"ids": torch.zeros(3, dtype=I64)}, "ids"),
        ({"context_lens": torch.zeros(4, dtype=I32)[::2]}, "context_lens"),
    ],
)
def test_wrong_arguments_of_advancing_are_named(changes, name):
    zeros = torch.zeros(2, dtype=I64)
    arguments = {"token_ids": zeros, "context_lens": torch.zeros(2, dtype=I32), "ids": zeros}
    with pytest.raises(ValueError, match=name):
        advance_rows(**(arguments | changes))

"""Rows of the table, in the type asked for."""

import pytest
import torch

from kernels.embedding import embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows(dtype):
    table, ids = torch.randn(11, 24), torch.tensor([10, 0, 3, 3])
    out = embedding(ids, table, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, torch.stack([table[i] for i in ids.tolist()]).to(dtype))


def test_an_id_past_the_table():
    with pytest.raises(IndexError):
        embedding(torch.tensor([11]), torch.zeros(11, 24), torch.float32)


@pytest.mark.parametrize(
    ("ids", "table", "name"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3, 4), "token_ids"),
        (torch.zeros(2), torch.zeros(3, 4), "token_ids"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3), "table must"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3, 4).t(), "table must"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3, 4, device="meta"), "table is on"),
    ],
)
def test_wrong_arguments_are_named(ids, table, name):
    with pytest.raises(ValueError, match=name):
        embedding(ids, table, torch.float32)

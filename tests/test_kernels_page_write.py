"""New keys and values land at their slots, and nothing else changes."""

import pytest
import torch

from kernels.page_write import page_write

PAGES, LAYERS, KV_HEADS, PAGE_SIZE, D = 5, 3, 2, 16, 8


def arguments(**changes: object) -> dict[str, object]:
    fused = torch.randn(3, 2 * KV_HEADS, D)
    return {
        "k": fused[:, :KV_HEADS],
        "v": fused[:, KV_HEADS:],
        "cache": torch.full((PAGES, LAYERS, 2, KV_HEADS, PAGE_SIZE, D), 7.0),
        "layer": 1,
        "slots": torch.tensor([0, 4 * PAGE_SIZE + 15, PAGE_SIZE]),
    } | changes


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_where_it_should(dtype, tokens):
    given = arguments(cache=torch.full((PAGES, LAYERS, 2, KV_HEADS, PAGE_SIZE, D), 7.0, dtype=dtype))
    given |= {name: given[name][-tokens:] for name in ("k", "v", "slots")}
    expected = given["cache"].clone()
    for token, slot in enumerate(given["slots"].tolist()):
        for head in range(KV_HEADS):
            page, offset = divmod(slot, PAGE_SIZE)
            expected[page, 1, 0, head, offset] = given["k"][token, head].to(dtype)
            expected[page, 1, 1, head, offset] = given["v"][token, head].to(dtype)
    page_write(**given)
    assert torch.equal(given["cache"], expected)


@pytest.mark.parametrize("slots", [[PAGES * PAGE_SIZE], [0, 1, PAGES * PAGE_SIZE]], ids=str)
def test_a_slot_past_the_pool(slots):
    row = torch.zeros(len(slots), KV_HEADS, D)
    with pytest.raises(IndexError):
        page_write(**arguments(k=row, v=row, slots=torch.tensor(slots)))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"k": torch.zeros(3, KV_HEADS, D + 1)}, "k and v"),
        ({"v": torch.zeros(2, KV_HEADS, D)}, "k and v"),
        ({"slots": torch.tensor([0])}, "k and v"),
        ({"layer": LAYERS}, "layer"),
        ({"layer": -1}, "layer"),
        ({"cache": torch.zeros(PAGES, LAYERS, 2, KV_HEADS, PAGE_SIZE)}, "cache"),
        ({"cache": torch.zeros(LAYERS, PAGES, 2, KV_HEADS, PAGE_SIZE, D).transpose(0, 1)}, "cache"),
    ],
)
def test_wrong_arguments_are_named(changes, name):
    with pytest.raises(ValueError, match=name):
        page_write(**arguments(**changes))

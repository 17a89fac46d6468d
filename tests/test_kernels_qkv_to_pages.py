"""The fused step gives what its separate parts give, and its arguments are checked."""

import pytest
import torch

from kernels.page_write import page_write
from kernels.qkv_to_pages import qkv_to_pages, qkv_to_pages_triton
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_tables

HEADS, KV_HEADS, D, PAGE_SIZE = 6, 2, 16, 4
EPS = 1e-5


def arguments(tokens: int = 3, **changes: object) -> dict[str, object]:
    cos, sin = rope_tables(100.0 ** -(torch.arange(0, D, 2) / D), 64)
    positions = torch.tensor([0, 63, 17])[:tokens]
    return {
        "qkv": torch.randn(tokens, HEADS + 2 * KV_HEADS, D),
        "cos": cos[positions],
        "sin": sin[positions],
        "q_norm": torch.randn(D),
        "k_norm": torch.randn(D),
        "eps": EPS,
        "cache": torch.full((5, 3, 2, KV_HEADS, PAGE_SIZE, D), 7.0),
        "layer": 1,
        "slots": torch.tensor([9, 0, 19])[:tokens],
    } | changes


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("normed", [False, True])
def test_equals_the_separate_steps(tokens, normed):
    given = arguments(tokens) if normed else arguments(tokens, q_norm=None, k_norm=None)
    expected = given["cache"].clone()
    q, k, v = given["qkv"].split((HEADS, KV_HEADS, KV_HEADS), 1)
    if normed:
        q, k = rms_norm(q, given["q_norm"], EPS), rms_norm(k, given["k_norm"], EPS)
    q, k = rope(q, k, given["cos"], given["sin"])
    page_write(k, v, expected, 1, given["slots"])
    assert torch.equal(qkv_to_pages(**given), q)
    assert torch.equal(given["cache"], expected)
    assert (expected[:, 1] != 7.0).sum() == tokens * 2 * KV_HEADS * D


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_padded_row_is_not_written(tokens):
    given = arguments(tokens, slots=torch.tensor([-1, 5, -1])[:tokens])
    qkv_to_pages(**given)
    written = (given["cache"] != 7.0).nonzero()[:, [0, 4]].unique(dim=0)
    assert written.tolist() == ([] if tokens == 1 else [[1, 1]])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"qkv": torch.zeros(3, 2 * KV_HEADS, D)}, "qkv must be"),
        ({"qkv": torch.zeros(3, HEADS + 2 * KV_HEADS, D + 2)}, "qkv must be"),
        ({"cos": torch.zeros(2, D)}, "cos and sin"),
        ({"sin": torch.zeros(3, D + 1)}, "cos and sin"),
        ({"q_norm": None}, "q_norm and k_norm"),
        ({"k_norm": torch.zeros(D + 1)}, "q_norm and k_norm"),
        ({"cache": torch.zeros(5, 3, 2, KV_HEADS, PAGE_SIZE)}, "cache"),
        ({"layer": 3}, "layer"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "slots"),
    ],
)
def test_wrong_arguments_are_named(changes, name):
    with pytest.raises(ValueError, match=name):
        qkv_to_pages(**arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"qkv": torch.zeros(3, HEADS + 2 * KV_HEADS, 2 * D)[:, :, ::2]}, "qkv must have"),
        ({"qkv": torch.zeros(3, D, HEADS + 2 * KV_HEADS).transpose(1, 2)}, "qkv must have"),
        ({"cos": torch.zeros(D, 3).t()}, "cos must be contiguous"),
        ({"sin": torch.zeros(3, D).half()}, "sin must be float32"),
        ({"k_norm": torch.zeros(2 * D)[::2]}, "k_norm"),
        ({"slots": torch.zeros(3, dtype=torch.int64, device="meta")}, "slots"),
    ],
)
def test_wrong_layouts_for_the_kernel_are_named(changes, name):
    with pytest.raises(ValueError, match=name):
        qkv_to_pages_triton(**arguments(**changes))

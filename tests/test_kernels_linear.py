"""Every layout of a weight gives the product of the weight."""

import pytest
import torch

from kernels import linear as module
from kernels.linear import BlockedWeight, PackedWeight, linear, prepare_weight

SHAPES = [(64, 48), (48, 64), (13001, 40)]  # wide, tall, several blocks


def weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(0.2).to(dtype)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prepared_products(shape, dtype, rows):
    w = weight(shape, dtype)
    x = torch.randn(rows, shape[1])
    out = linear(x, prepare_weight(w))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), x.double() @ w.double().t(), atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_and_more_dimensions(dtype):
    w, bias = weight((64, 48), dtype), torch.randn(64).to(dtype)
    x = torch.randn(2, 5, 48).to(dtype)
    expected = x.double() @ w.double().t() + bias.double()
    tolerance = 5e-6 if dtype == torch.float32 else 2e-2
    for layout in (w, prepare_weight(w)):
        out = linear(x, layout, bias)
        assert out.dtype == dtype
        assert out.shape == (2, 5, 64)
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_half_width_weights_keep_their_values():
    """The tiles hold float16: a unit input gives each weight back."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("no FBGEMM on this platform")
    w = weight((32, 16), torch.bfloat16)
    w[0] = 2.0**-18 * torch.arange(16)
    packed = prepare_weight(w)
    assert isinstance(packed, PackedWeight)
    assert torch.equal(linear(torch.eye(16), packed).t(), w.float())


@pytest.mark.parametrize("largest", [1e5, 2.0**-9])
def test_weights_that_float16_would_spoil_stay_wide(largest):
    w = (weight((64, 48), torch.float32) / weight((64, 48), torch.float32).abs().max() * largest).bfloat16()
    prepared = prepare_weight(w)
    assert isinstance(prepared, BlockedWeight)
    x = torch.randn(3, 48)
    expected = x.double() @ w.double().t()
    torch.testing.assert_close(linear(x, prepared).double(), expected, atol=1e-5 * largest, rtol=1e-5)


def test_without_fbgemm(monkeypatch):
    monkeypatch.setattr(module, "has_float16_tiles", lambda: False)
    w, x = weight((64, 48), torch.bfloat16), torch.randn(3, 48)
    expected = x.double() @ w.double().t()
    torch.testing.assert_close(linear(x, prepare_weight(w)).double(), expected, atol=5e-6, rtol=5e-6)


def test_inference_mode_and_views():
    w = weight((64, 48), torch.float32)
    x = torch.randn(4, 96)[:, ::2]
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float16):
            out = linear(x, prepare_weight(w.to(dtype)))
            torch.testing.assert_close(out.double(), x.double() @ w.to(dtype).double().t(), atol=5e-6, rtol=5e-6)


def test_wrong_arguments_are_named():
    for w in (weight((64, 48), torch.float32), weight((64, 48), torch.float16)):
        for layout in (w, prepare_weight(w)):
            with pytest.raises(ValueError, match="x has 47"):
                linear(torch.randn(3, 47), layout)
    with pytest.raises(ValueError, match="w must be"):
        prepare_weight(torch.zeros(3))

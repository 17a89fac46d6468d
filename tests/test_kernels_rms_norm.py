"""Root-mean-square norm equals its formula in float64."""

import pytest
import torch

from kernels.rms_norm import rms_norm, rms_norm_residual

EPS = 1e-5


def formula(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w.double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 576), (7, 96), (5, 4, 64)], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_norm(dtype, tolerance, shape, size):
    x, w = (torch.randn(shape) * size).to(dtype), torch.randn(shape[-1]).to(dtype)
    out = rms_norm(x, w, EPS)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), formula(x, w), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3)])
def test_residual(dtype, tolerance):
    x, residual, w = (torch.randn(shape).to(dtype) for shape in ((3, 96), (3, 96), (96,)))
    normed, added = rms_norm_residual(x, residual, w, EPS)
    assert torch.equal(added, x + residual)
    torch.testing.assert_close(normed.double(), formula(added, w), atol=tolerance, rtol=tolerance)


def test_views():
    x, w = torch.randn(4, 15, 64)[:, :9], torch.randn(64)
    torch.testing.assert_close(rms_norm(x, w, EPS).double(), formula(x, w), atol=2e-6, rtol=2e-6)


def test_wrong_arguments_are_named():
    x, w = torch.randn(3, 96), torch.randn(96)
    with pytest.raises(ValueError, match="w is"):
        rms_norm(x, w[:1], EPS)
    with pytest.raises(ValueError, match="residual is"):
        rms_norm_residual(x, x[:1], w, EPS)
    with pytest.raises(ValueError, match="residual is"):
        rms_norm_residual(x, x.half(), w, EPS)

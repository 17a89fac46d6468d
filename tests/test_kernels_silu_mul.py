"""The gate equals its formula in float64."""

import pytest
import torch

from kernels.silu_mul import silu_mul


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1, 3072), (7, 96)], ids=str)
def test_gate(dtype, tolerance, shape):
    gate_up = (torch.randn(shape) * 10).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    out = silu_mul(gate_up)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), gate * torch.sigmoid(gate) * up, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(3, 7), (8,)], ids=str)
def test_wrong_arguments_are_named(shape):
    with pytest.raises(ValueError, match="gate_up"):
        silu_mul(torch.zeros(shape))

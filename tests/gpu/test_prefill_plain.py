"""The plain Triton kernel of prefill attention, which other GPUs and float32 run, on whatever GPU is there."""

import pytest
import torch

from attention_cases import assert_close, attend, error, make_case
from kernels.prefill_attention import prefill_attention_triton

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

QUERIES, CONTEXTS = [300, 64, 129, 1000, 1, 128], [300, 200, 129, 1500, 70, 4096]


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (1, 0.0), (100, 0.0), (1000, 30.0), (0, 30.0)])
@pytest.mark.parametrize(("d", "page_size"), [(64, 16), (96, 64), (128, 64), (256, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_windows_and_soft_caps(dtype, d, page_size, window, soft_cap):
    case = make_case(QUERIES, CONTEXTS, d=d, page_size=page_size, dtype=dtype)
    lse = torch.full(case.q.shape[:2], float("nan"), device="cuda")
    options = {"window": window, "soft_cap": soft_cap}
    out = prefill_attention_triton(case.q, case.cache, case.layer, case.plan, lse, **options)
    if dtype != torch.float32:
        assert_close(case, out, lse, **options)
        return
    reference, reference_lse = attend(case, torch.float64, **options)
    assert error(out, reference) < 3e-6
    assert torch.allclose(lse.double(), reference_lse, atol=1e-5, rtol=1e-6)

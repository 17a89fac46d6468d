"""One small case of each kernel that uses shared memory by itself: compute-sanitizer's racecheck watches these."""

import pytest
import torch
import torch.nn.functional as F

from attention_cases import assert_close, make_case
from kernels.capability import is_hopper
from kernels.cascade_attention import cascade_attention
from kernels.decode_attention import decode_attention
from kernels.linear import linear
from kernels.rms_norm import rms_norm_residual, rms_norm_torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")]


@pytest.mark.parametrize(("d", "long_keys", "window"), [(64, 1500, 0), (64, 0, 0), (64, 0, 100), (128, 1500, 0)])
def test_prefill(monkeypatch, d, long_keys, window):
    import kernels.hopper_prefill

    monkeypatch.setattr(kernels.hopper_prefill, "LONG_KEYS", long_keys)
    case = make_case([65], [300], heads=2, kv_heads=1, d=d)
    attention = kernels.hopper_prefill.prefill_attention_hopper
    assert_close(case, attention(case.q, case.cache, case.layer, case.plan, window=window), None, window)


@pytest.mark.parametrize(
    ("queries", "invariant", "options"), [(1, False, {}), (4, False, {"window": 100, "soft_cap": 30.0}), (1, True, {})]
)
def test_decode(queries, invariant, options):
    shape = {"heads": 4, "kv_heads": 1, "num_decodes": 2, "decode_queries": queries, "batch_invariant": invariant}
    case = make_case([queries] * 2, [130, 300], **shape)
    assert_close(case, decode_attention(case.q, case.cache, case.layer, case.plan, **options), None, **options)


def test_cascade():
    case = make_case([1] * 3, [130, 300, 200], num_decodes=3, prefix=128, heads=4, kv_heads=1)
    assert_close(case, cascade_attention(case.q, case.cache, case.layer, case.plan, 128), None)


@pytest.mark.parametrize("rows", [1, 2])
def test_product(rows):
    x, w = torch.randn(rows, 1544).half(), torch.randn(72, 1544).half()
    expected = F.linear(x.float(), w.float()).half()  # on the CPU: racecheck finds hazards in cuBLAS's kernels
    torch.testing.assert_close(linear(x.cuda(), w.cuda()).cpu(), expected, rtol=2e-3, atol=0.1)


def test_norm():
    x, residual, w = torch.randn(3, 2, 576, device="cuda").to(torch.bfloat16)
    out, added = rms_norm_residual(x, residual, w[0], 1e-5)
    torch.testing.assert_close(out, rms_norm_torch(added, w[0], 1e-5))

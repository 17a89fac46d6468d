import pytest
import torch

from attention_cases import assert_close, make_case
from kernels import decode_attention, prefill_attention
from kernels.attention import paged_attention
from kernels.capability import has_hopper_decode, has_hopper_prefill, is_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def mixed(**shape):
    return make_case([1, 1, 1, 300, 64], [50, 700, 1, 300, 200], num_decodes=3, **shape)


@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_decodes_and_chunks_of_one_step(d, page_size):
    case = mixed(d=d, page_size=page_size)
    assert_close(case, paged_attention(case.q, case.cache, case.layer, case.plan), None)


@pytest.mark.parametrize("d", [64, 96, 128])
def test_several_queries_a_decode_window_and_soft_cap(d):
    case = make_case([4, 4, 300, 64], [50, 700, 300, 200], num_decodes=2, decode_queries=4, d=d)
    options = {"window": 70, "soft_cap": 20.0}
    assert_close(case, paged_attention(case.q, case.cache, case.layer, case.plan, **options), None, **options)


def test_float32_takes_the_plain_kernels():
    case = mixed(dtype=torch.float32)
    assert not has_hopper_decode(case.q, case.cache)
    assert_close(case, paged_attention(case.q, case.cache, case.layer, case.plan), None)


@pytest.mark.skipif(not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")
def test_hopper_takes_what_it_has_kernels_for(monkeypatch):
    case = mixed()
    assert has_hopper_decode(case.q, case.cache)
    assert has_hopper_prefill(case.q, case.cache)

    def fail(*args, **options):
        raise AssertionError("the plain kernel was launched")

    monkeypatch.setattr(decode_attention, "decode_attention_triton", fail)
    monkeypatch.setattr(prefill_attention, "prefill_attention_triton", fail)
    assert_close(case, paged_attention(case.q, case.cache, case.layer, case.plan), None)

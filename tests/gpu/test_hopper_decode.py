import pytest
import torch

from attention_cases import assert_close, attend, error, make_case
from kernels.capability import is_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")]

RAGGED = [1, 63, 64, 65, 128, 1000, 4096, 129, 2, 777]


def run(case):
    from kernels.hopper_decode import decode_attention_hopper

    lse = torch.full(case.q.shape[:2], float("nan"), device="cuda")
    return decode_attention_hopper(case.q, case.cache, case.layer, case.plan, lse), lse


def decodes(contexts, **shape):
    return make_case([1] * len(contexts), contexts, num_decodes=len(contexts), **shape)


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("d", [64, 128])
def test_ragged_lengths(d, page_size):
    case = decodes(RAGGED, d=d, page_size=page_size, seed=page_size + d)
    for _ in range(3):  # what one launch leaves behind must not reach the next
        out, lse = run(case)
    assert_close(case, out, lse)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (28, 4), (32, 2), (64, 1)])
def test_groups(heads, kv_heads):
    case = decodes([300, 1, 64, 2000], heads=heads, kv_heads=kv_heads, seed=heads)
    assert_close(case, *run(case))


def test_float16():
    case = decodes([300, 1, 64, 2000], dtype=torch.float16)
    assert_close(case, *run(case))


@pytest.mark.parametrize("context", [1, 15, 16, 17, 8448, 16384, 131072])
def test_one_sequence(context):
    case = decodes([context], heads=32, kv_heads=8, seed=context)
    assert_close(case, *run(case))


def test_many_sequences():
    case = decodes([200] * 200 + [1, 6400, 64] + list(range(1, 54)), seed=5)
    assert_close(case, *run(case))


def test_one_key_dominates():
    case = decodes([500, 3000], scale=30.0)
    assert_close(case, *run(case))


def test_scores_all_very_negative():
    case = decodes([500, 3000])
    case.q.fill_(-40.0)
    case.cache.copy_(case.cache.abs())
    assert_close(case, *run(case))


def test_without_log_sum_exp():
    from kernels.hopper_decode import decode_attention_hopper

    case = decodes(RAGGED)
    with_lse, _ = run(case)
    assert torch.equal(decode_attention_hopper(case.q, case.cache, case.layer, case.plan), with_lse)


def test_queries_may_be_a_slice_of_a_fused_product():
    case = decodes(RAGGED)
    wide = torch.randn(len(RAGGED), 12, 128, device="cuda", dtype=torch.bfloat16)
    wide[:, :8] = case.q
    expected, _ = run(case)
    case.q = wide[:, :8]
    assert torch.equal(run(case)[0], expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_one_graph_serves_changing_lengths(overlap):
    from kernels.hopper_decode import DecodeSchedule, decode_pages

    case = decodes([700, 64, 1500, 333])
    lens = case.plan.context_lens.clone()
    schedule = DecodeSchedule(lens, 8, 2, 128)
    table = case.plan.page_table
    lse = torch.zeros(4, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    decode_pages(case.q, case.cache, 1, table, schedule, lse, overlap_previous=overlap)
    with torch.cuda.graph(graph):
        schedule.refresh()
        q = case.q * 1
        for _ in range(3):
            out = decode_pages(q, case.cache, 1, table, schedule, lse, overlap_previous=overlap)
    for shorter in ([700, 64, 1500, 333], [1, 64, 1499, 65], [640, 1, 64, 256]):
        lens.copy_(torch.tensor(shorter))
        out.fill_(float("nan"))
        graph.replay()
        now = decodes([700, 64, 1500, 333])
        now.plan.contexts = shorter
        reference, reference_lse = attend(now, torch.float32)
        assert error(out, reference) < 6e-3
        assert torch.allclose(lse, reference_lse, atol=2e-3, rtol=1e-3)


def test_empty_rows_give_zeros():
    from kernels.hopper_decode import DecodeSchedule, decode_pages

    case = decodes([700, 64, 1500, 333])
    lens = torch.tensor([700, 0, 1500, 0], dtype=torch.int32, device="cuda")
    lse = torch.full((4, 8), float("nan"), device="cuda")
    out = decode_pages(case.q, case.cache, 1, case.plan.page_table, DecodeSchedule(lens, 8, 2, 128), lse)
    expected, expected_lse = run(case)
    assert error(out[::2], expected[::2]) < 4e-3
    assert torch.allclose(lse[::2], expected_lse[::2], atol=1e-3)
    assert not out[1::2].any()
    assert torch.isneginf(lse[1::2]).all()

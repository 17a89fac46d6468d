import pytest
import torch

from attention_cases import assert_close, attend, error, make_case
from kernels.capability import is_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")]

MIXES = [
    ([300, 64, 129, 1000, 1, 128], [300, 200, 129, 1500, 70, 4096]),
    ([17, 700, 333, 1, 640, 65], [17, 2771, 3333, 1, 641, 190]),
]


def run(case):
    from kernels.hopper_prefill import prefill_attention_hopper

    skip = case.plan.num_decodes
    q = case.q[skip:]
    lse = torch.full(q.shape[:2], float("nan"), device="cuda")
    return prefill_attention_hopper(q, case.cache, case.layer, case.plan, lse), lse


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("d", [64, 128])
def test_ragged_mixes(d, page_size):
    for seed, (queries, contexts) in enumerate(MIXES):
        case = make_case(queries, contexts, d=d, page_size=page_size, seed=seed)
        for _ in range(3):  # what one launch leaves behind must not reach the next
            out, lse = run(case)
        assert_close(case, out, lse)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (28, 4), (16, 1)])
def test_groups(heads, kv_heads):
    case = make_case([300, 64, 129], [300, 200, 1290], heads=heads, kv_heads=kv_heads, seed=heads)
    assert_close(case, *run(case))


def test_float16():
    case = make_case(*MIXES[0], dtype=torch.float16)
    assert_close(case, *run(case))


@pytest.mark.parametrize("context", [1, 63, 64, 65, 127, 128, 129, 255, 257, 511, 577, 1023])
def test_one_off_each_boundary(context):
    case = make_case([context], [context], seed=context)
    assert_close(case, *run(case))


@pytest.mark.parametrize(("queries", "context"), [(577, 8192), (577, 16385), (1, 131072), (200, 131072), (4096, 4096)])
def test_long_contexts(queries, context):
    case = make_case([queries], [context], heads=4, kv_heads=1, seed=queries)
    assert_close(case, *run(case))


def test_more_tiles_than_programs():
    case = make_case([513] * 30, [513 + 37 * i for i in range(30)], heads=16, kv_heads=4)
    assert_close(case, *run(case))


def test_one_key_dominates():
    case = make_case(*MIXES[1], scale=30.0)
    assert_close(case, *run(case))


def test_scores_all_very_negative():
    case = make_case(*MIXES[1])
    case.q.fill_(-40.0)
    case.cache.copy_(case.cache.abs())
    assert_close(case, *run(case))


def test_decode_rows_stand_before_the_chunks():
    case = make_case([1, 1, 300, 64], [50, 700, 300, 200], num_decodes=2)
    out, lse = run(case)
    reference, reference_lse = attend(case, torch.float32)
    assert error(out, reference[2:]) < 6e-3
    assert torch.allclose(lse, reference_lse[2:], atol=2e-3, rtol=1e-3)


def test_queries_may_be_a_slice_of_a_fused_product():
    case = make_case(*MIXES[0])
    wide = torch.randn(case.q.shape[0], 12, 128, device="cuda", dtype=torch.bfloat16)
    wide[:, :8] = case.q
    expected, _ = run(case)
    case.q = wide[:, :8]
    assert torch.equal(run(case)[0], expected)

import random

import pytest
import torch

from attention_cases import assert_close, attend, error, make_case
from kernels.capability import is_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")]

MIXES = [
    ([300, 64, 129, 1000, 1, 128], [300, 200, 129, 1500, 70, 4096]),
    ([17, 700, 333, 1, 640, 65], [17, 2771, 3333, 1, 641, 190]),
]
# All of these with each (head_dim, page size): a window in a page, in a step, at a step's end, over several, over all.
WINDOWS = [1, 50, 128, 129, 1000, 10**5]


def run(case, window=0, soft_cap=0.0):
    from kernels.hopper_prefill import prefill_attention_hopper

    q = case.q[case.plan.decode_tokens :]
    lse = torch.full(q.shape[:2], float("nan"), device="cuda")
    poison = torch.full(q.shape, float("nan"), dtype=q.dtype, device="cuda")  # what the result's memory held
    del poison
    return prefill_attention_hopper(q, case.cache, case.layer, case.plan, lse, window=window, soft_cap=soft_cap), lse


def check(case, window=0, soft_cap=0.0):
    assert_close(case, *run(case, window, soft_cap), window, soft_cap)


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_ragged_mixes(d, page_size):
    for seed, (queries, contexts) in enumerate(MIXES):
        case = make_case(queries, contexts, d=d, page_size=page_size, seed=seed)
        for _ in range(3):  # what one launch leaves behind must not reach the next
            out, lse = run(case)
        assert_close(case, out, lse)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("d", "page_size"), [(64, 16), (96, 64), (128, 64), (128, 128), (256, 128)])
def test_windows(d, page_size, window):
    for seed, (queries, contexts) in enumerate(MIXES):
        check(make_case(queries, contexts, d=d, page_size=page_size, seed=seed), window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_soft_caps(d, dtype):
    for seed, scale in enumerate([1.0, 20.0]):  # scores mostly below the cap, and far above it
        case = make_case(*MIXES[seed], d=d, dtype=dtype, seed=seed, scale=scale)
        check(case, soft_cap=30.0)
        check(case, window=700, soft_cap=30.0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (28, 4), (16, 1), (1, 1)])
@pytest.mark.parametrize("d", [96, 128])
def test_groups(heads, kv_heads, d):
    check(make_case([300, 64, 129], [300, 200, 1290], heads=heads, kv_heads=kv_heads, d=d, seed=heads))


@pytest.mark.parametrize("d", [64, 128, 256])
def test_float16(d):
    check(make_case(*MIXES[0], d=d, dtype=torch.float16))


@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_one_off_each_boundary(page_size, d):
    for edge in (page_size, 64, 128, 256, 512):
        for context in (edge - 1, edge, edge + 1):
            for queries in (context, 1, min(context, 65)):
                check(make_case([queries], [context], page_size=page_size, d=d, seed=context))


@pytest.mark.parametrize("queries", [1, 2, 63, 65, 128, 200, 577])
@pytest.mark.parametrize("context", [577, 8192, 16385, 131072])
def test_few_queries_over_long_contexts(queries, context):
    check(make_case([queries], [context], heads=4, kv_heads=1, seed=queries))


@pytest.mark.parametrize(("d", "page_size"), [(64, 16), (96, 16), (256, 64)])
def test_the_longest_context(d, page_size):
    case = make_case([577], [131071], heads=2, kv_heads=1, d=d, page_size=page_size)
    check(case)
    check(case, window=4096)


@pytest.mark.parametrize("d", [64, 128])
def test_lengths_to_16k(d):
    check(make_case([1, 16384, 77, 5000], [3, 16384, 12000, 16001], heads=2, kv_heads=1, d=d))


def test_more_tiles_than_programs():
    case = make_case([513] * 30, [513 + 37 * i for i in range(30)], heads=16, kv_heads=4)
    check(case)
    check(case, window=300)


@pytest.mark.parametrize("seed", range(24))
def test_random_batches(seed):
    rng = random.Random(seed)
    contexts = [rng.choice([rng.randint(1, 200), rng.randint(1, 5000)]) for _ in range(rng.randint(1, 12))]
    queries = [min(n, rng.choice([1, n, rng.randint(1, n)])) for n in contexts]
    d, page_size = rng.choice([64, 96, 128, 256]), rng.choice([16, 64, 128])
    dtype = rng.choice([torch.bfloat16, torch.float16])
    case = make_case(queries, contexts, d=d, page_size=page_size, dtype=dtype, seed=seed)
    check(case)
    check(case, window=rng.choice(WINDOWS), soft_cap=rng.choice([0.0, 50.0]))


@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 200])
def test_one_key_dominates(d, window):
    check(make_case(*MIXES[1], d=d, scale=30.0), window)


@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 200])
def test_scores_all_very_negative(d, window):
    case = make_case(*MIXES[1], d=d)
    case.q.fill_(-40.0)
    case.cache.copy_(case.cache.abs())
    check(case, window)


def test_pages_before_the_window_are_not_read():
    case = make_case([300, 64], [3000, 1000], page_size=64)
    good = run(case, window=500)[0]
    for row, context, queries in zip(case.plan.page_table, case.plan.contexts, case.plan.queries, strict=True):
        case.cache[row[: (context - queries - 500 + 1) // 128 * 2].long()] = float("nan")
    assert torch.equal(run(case, window=500)[0], good)


def test_decode_rows_stand_before_the_chunks():
    case = make_case([1, 1, 300, 64], [50, 700, 300, 200], num_decodes=2)
    out, lse = run(case)
    reference, reference_lse = attend(case, torch.float32)
    assert error(out, reference[2:]) < 6e-3
    assert torch.allclose(lse, reference_lse[2:], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("d", [96, 128])
def test_queries_may_be_a_slice_of_a_fused_product(d):
    case = make_case(*MIXES[0], d=d)
    wide = torch.full((case.q.shape[0], 12, d), float("nan"), device="cuda", dtype=torch.bfloat16)
    wide[:, :8] = case.q
    expected, _ = run(case)
    case.q = wide[:, :8]
    assert torch.equal(run(case)[0], expected)

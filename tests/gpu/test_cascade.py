import pytest
import torch

from attention_cases import assert_close, attend, error, make_case
from kernels.capability import is_hopper
from kernels.cascade_attention import cascade_attention, cascade_attention_triton
from kernels.merge_attention import merge_attention, merge_attention_torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HOPPER = pytest.mark.skipif(not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")
KERNELS = pytest.mark.parametrize("kernel", [pytest.param("hopper", marks=HOPPER), "triton"])


def decodes(contexts, prefix, queries=1, **shape):
    seqs = len(contexts)
    return make_case([queries] * seqs, contexts, num_decodes=seqs, decode_queries=queries, prefix=prefix, **shape)


def run(kernel, case, prefix, **options):
    lse = torch.full(case.q.shape[:2], float("nan"), device="cuda")
    attention = cascade_attention if kernel == "hopper" else cascade_attention_triton
    return attention(case.q, case.cache, case.layer, case.plan, prefix, lse, **options), lse


@KERNELS
@pytest.mark.parametrize("seqs", [1, 3, 31, 33, 64, 130])
@pytest.mark.parametrize("prefix", [0, 64, 2048])
def test_against_plain_attention(kernel, prefix, seqs):
    contexts = [prefix + 1 + 37 * i % 300 for i in range(seqs)]
    case = decodes(contexts, prefix, seed=seqs)
    assert_close(case, *run(kernel, case, prefix))


@KERNELS
@pytest.mark.parametrize(("d", "page_size", "prefix"), [(64, 16, 48), (64, 64, 8192), (128, 128, 384), (128, 16, 8208)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (28, 4), (32, 1)])
def test_shapes(kernel, heads, kv_heads, d, page_size, prefix):
    contexts = [prefix + n for n in (2, 15, 16, 17, 64, 65, 300)]
    case = decodes(contexts, prefix, 2, heads=heads, kv_heads=kv_heads, d=d, page_size=page_size)
    assert_close(case, *run(kernel, case, prefix))


@KERNELS
def test_soft_cap_and_float16(kernel):
    case = decodes([700, 650, 1000], 640, 4, dtype=torch.float16, scale=5.0)
    assert_close(case, *run(kernel, case, 640, soft_cap=4.0), soft_cap=4.0)


@KERNELS
def test_one_key_dominates(kernel):
    case = decodes([700, 650, 1000] * 9, 640, scale=30.0)
    assert_close(case, *run(kernel, case, 640))


def test_a_prefix_that_is_not_shared_is_refused():
    case = decodes([700, 650, 1000], 128)
    with pytest.raises(ValueError, match="page_table"):
        cascade_attention(case.q, case.cache, 1, case.plan, 192)


@HOPPER
def test_one_graph_serves_changing_lengths_and_prefixes():
    from kernels.hopper_cascade import CascadeSchedule, cascade_pages

    contexts, prefix = [700, 1064, 1500, 833], 640
    case = decodes(contexts, prefix)
    lens, shared = case.plan.context_lens.clone(), torch.tensor([prefix], dtype=torch.int32, device="cuda")
    schedule = CascadeSchedule(lens, shared, 8, 2, 128)
    lse = torch.zeros(4, 8, device="cuda")
    arguments = (case.q, case.cache, 1, case.plan.page_table, schedule, lse)
    cascade_pages(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        schedule.refresh()
        for _ in range(3):
            out = cascade_pages(*arguments)
    for part, lengths in ((640, contexts), (640, [641, 700, 1500, 642]), (64, [65, 66, 640, 700]), (0, [1, 64, 65, 2])):
        lens.copy_(torch.tensor(lengths))
        shared.fill_(part)
        out.fill_(float("nan"))
        graph.replay()
        now = decodes(contexts, prefix)
        now.plan.contexts = lengths
        reference, reference_lse = attend(now, torch.float32)
        assert error(out, reference) < 6e-3
        assert torch.allclose(lse, reference_lse, atol=2e-3, rtol=1e-3)


@HOPPER
def test_empty_suffixes_and_an_empty_prefix():
    from kernels.hopper_cascade import CascadeSchedule, cascade_pages

    case = decodes([640, 1000, 640], 640)
    lens, shared = case.plan.context_lens.clone(), torch.tensor([640], dtype=torch.int32, device="cuda")
    lse = torch.full((3, 8), float("nan"), device="cuda")
    out = cascade_pages(case.q, case.cache, 1, case.plan.page_table, CascadeSchedule(lens, shared, 8, 2, 128), lse)
    assert_close(case, out, lse)
    shared.zero_()
    lens.copy_(torch.tensor([0, 1000, 0]))
    out = cascade_pages(case.q, case.cache, 1, case.plan.page_table, CascadeSchedule(lens, shared, 8, 2, 128), lse)
    assert not out[::2].any()
    assert torch.isneginf(lse[::2]).all()
    reference, _ = attend(case, torch.float32)
    assert error(out[1], reference[1]) < 6e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(dtype):
    parts, lses = torch.randn(2, 70, 3, 96, device="cuda"), torch.randn(2, 70, 3, device="cuda") * 5
    lses[0, :30], lses[1, 20:50] = -torch.inf, -torch.inf
    parts[lses.isneginf()] = torch.nan
    lse, expected_lse = torch.full((2, 70, 3), torch.nan, device="cuda")
    out = merge_attention(parts[0], lses[0], parts[1], lses[1], dtype, lse)
    expected = merge_attention_torch(parts[0], lses[0], parts[1], lses[1], dtype, expected_lse)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)

"""Windows, soft-caps, several queries a sequence and batch-invariance, by the Hopper kernels and by the plain ones."""

import pytest
import torch

from attention_cases import assert_close, attend, error, make_case
from kernels.capability import is_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HOPPER = pytest.mark.skipif(not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU")
KERNELS = pytest.mark.parametrize("kernel", [pytest.param("hopper", marks=HOPPER), "triton"])
RAGGED = [8, 63, 64, 65, 128, 1000, 4096, 129, 9, 777]


def run(kernel, case, **options):
    if kernel == "hopper":
        from kernels.hopper_decode import decode_attention_hopper as attention
    else:
        from kernels.decode_attention import decode_attention_triton as attention
    lse = torch.full(case.q.shape[:2], float("nan"), device="cuda")
    return attention(case.q, case.cache, case.layer, case.plan, lse, **options), lse


def decodes(contexts, queries=1, **shape):
    seqs = len(contexts)
    return make_case([queries] * seqs, contexts, num_decodes=seqs, decode_queries=queries, **shape)


@KERNELS
@pytest.mark.parametrize("window", [1, 63, 64, 65, 200, 5000])
@pytest.mark.parametrize(("d", "page_size"), [(64, 16), (128, 64), (128, 128)])
def test_window(kernel, d, page_size, window):
    case = decodes(RAGGED, d=d, page_size=page_size, seed=window)
    assert_close(case, *run(kernel, case, window=window), window=window)


@KERNELS
@pytest.mark.parametrize("soft_cap", [0.7, 30.0])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_soft_cap(kernel, scale, soft_cap):
    case = decodes(RAGGED, scale=scale)
    assert_close(case, *run(kernel, case, soft_cap=soft_cap), soft_cap=soft_cap)


@KERNELS
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (9, 3), (28, 4), (4, 4), (8, 1)])
@pytest.mark.parametrize("queries", [2, 4, 8])
def test_several_queries(kernel, queries, heads, kv_heads):
    case = decodes(RAGGED, queries, heads=heads, kv_heads=kv_heads, seed=queries)
    assert_close(case, *run(kernel, case))


@KERNELS
@pytest.mark.parametrize(("d", "page_size"), [(64, 16), (64, 64), (128, 16), (128, 128)])
@pytest.mark.parametrize("contexts", [[5], [131072], [300, 5, 20000]], ids=["short", "long", "ragged"])
def test_several_queries_of_few_sequences(kernel, contexts, d, page_size):
    case = decodes(contexts, 5, d=d, page_size=page_size, seed=d)
    assert_close(case, *run(kernel, case))


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_options_together(kernel, dtype):
    case = decodes(RAGGED, 3, dtype=dtype, batch_invariant=True)
    options = {"window": 100, "soft_cap": 20.0}
    assert_close(case, *run(kernel, case, **options), **options)


@KERNELS
@pytest.mark.parametrize("contexts", [RAGGED, [131072], [1] * 300, [8448] * 20], ids=lambda c: f"{len(c)}x{max(c)}")
def test_batch_invariant(kernel, contexts):
    case = decodes(contexts, batch_invariant=True)
    assert_close(case, *run(kernel, case))


@KERNELS
@pytest.mark.parametrize("context", [1, 64, 511, 513, 700, 5000, 40000])
@pytest.mark.parametrize("queries", [1, 4])
def test_a_sequence_is_bitwise_the_same_in_any_batch(kernel, queries, context):
    from kernels.attention_plan import AttentionPlan

    context += queries
    others = [[], [17] * 3, [9000, 100], [333] * 130]
    results = []
    for index, neighbours in enumerate(others):
        case = decodes([*neighbours, context], queries, seed=index)
        alone = decodes([context], queries, seed=99)
        pages = -(-context // 64)
        case.cache[case.plan.page_table[-1, :pages].long()] = alone.cache[alone.plan.page_table[0, :pages].long()]
        case.q[-queries:] = alone.q
        order = torch.arange(len(neighbours) + 1).roll(index)  # another place in each batch
        lens = case.plan.context_lens[order].contiguous()
        table = case.plan.page_table[order].contiguous()
        case.q = case.q.view(len(order), queries, *case.q.shape[1:])[order].flatten(0, 1)
        starts = case.plan.query_starts
        case.plan = AttentionPlan(table, starts, lens, len(order), 64, decode_queries=queries, batch_invariant=True)
        place = order.tolist().index(len(neighbours))
        out, lse = run(kernel, case)
        rows = slice(place * queries, (place + 1) * queries)
        results.append((out[rows].clone(), lse[rows].clone()))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def decode_without_reading_back(kernel, case, lens, queries, out, lse, **options):
    """Two calls that a graph can hold: what its head needs, and what fills out and lse."""
    if kernel == "triton":
        from kernels.decode_split import decode_split

        arguments = (case.q, case.cache, 1, case.plan.page_table, lens, out, lse)
        return lambda: None, lambda: decode_split(*arguments, longest=2048, **options)
    from kernels.hopper_decode import DecodeSchedule, decode_pages

    soft_cap = options.pop("soft_cap", 0.0)
    schedule = DecodeSchedule(lens, 8, 2, 128, queries=queries, **options)
    arguments = (case.q, case.cache, 1, case.plan.page_table, schedule, lse)
    return schedule.refresh, lambda: out.copy_(decode_pages(*arguments, soft_cap=soft_cap))


@KERNELS
@pytest.mark.parametrize("options", [{}, {"window": 90, "soft_cap": 9.0}, {"batch_invariant": True}], ids=str)
@pytest.mark.parametrize("queries", [1, 4])
def test_one_graph_serves_changing_lengths(kernel, queries, options):
    contexts = [700, 64, 1500, 333]
    case = decodes(contexts, queries)
    lens = case.plan.context_lens.clone()
    out, lse = torch.zeros_like(case.q), torch.zeros(case.q.shape[:2], device="cuda")
    refresh, call = decode_without_reading_back(kernel, case, lens, queries, out, lse, **options)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        refresh()
        for _ in range(2):  # what one launch leaves behind must not reach the next
            call()
    narrowed = {name: value for name, value in options.items() if name != "batch_invariant"}
    for shorter in (contexts, [4, 64, 1499, 65], [640, 5, 0, 256], [0, 0, 0, 0]):
        lens.copy_(torch.tensor(shorter))
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        for seq, length in enumerate(shorter):
            rows = slice(seq * queries, (seq + 1) * queries)
            if length == 0:
                assert not out[rows].any()
                assert torch.isneginf(lse[rows]).all()
        now = decodes(contexts, queries)
        kept = [seq for seq, length in enumerate(shorter) if length]
        if kept:
            now.plan.contexts = [length or queries for length in shorter]
            rows = torch.cat([torch.arange(seq * queries, (seq + 1) * queries) for seq in kept])
            reference, reference_lse = attend(now, torch.float32, **narrowed)
            assert error(out[rows], reference[rows]) < 6e-3
            assert torch.allclose(lse[rows], reference_lse[rows], atol=2e-3, rtol=1e-3)


@KERNELS
def test_results_are_the_same_each_time(kernel):
    case = decodes(RAGGED, 4)
    first, _ = run(kernel, case)
    for _ in range(5):
        assert error(run(kernel, case)[0], first) < 1e-2

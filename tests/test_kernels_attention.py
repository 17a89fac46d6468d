"""Attention over paged KV equals the textbook in float64, whatever is in the batch and in the pool beside it."""

import pytest
import torch

from kernels.attention import paged_attention
from kernels.decode_attention import decode_attention
from kernels.prefill_attention import prefill_attention
from kernels_oracle import LAYERS, Case, make_case

SHAPES = [
    pytest.param({"heads": 9, "kv_heads": 3, "head_dim": 64, "page_size": 64}, id="9-3-64-page64"),
    pytest.param({"heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": 16}, id="32-8-128-page16"),
    pytest.param({"heads": 4, "kv_heads": 4, "head_dim": 96, "page_size": 128}, id="4-4-96-page128"),
    pytest.param({"heads": 8, "kv_heads": 1, "head_dim": 256, "page_size": 16}, id="8-1-256-page16"),
]


def edges(page_size: int) -> list[int]:
    return [1, 2, page_size - 1, page_size, page_size + 1, 3 * page_size, 3 * page_size + 7]


def close(case: Case, tolerance: float = 3e-6) -> None:
    plan = case.plan()
    for layer in (0, LAYERS - 1, 1):
        torch.testing.assert_close(
            paged_attention(case.q, case.cache, layer, plan).double(),
            case.expected(layer)[0],
            atol=tolerance,
            rtol=tolerance,
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape):
    contexts = edges(shape["page_size"])
    close(make_case(contexts, [1] * len(contexts), **shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_prompts(shape):
    contexts = edges(shape["page_size"])
    close(make_case(contexts, contexts, **shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_after_a_prefix(shape):
    size = shape["page_size"]
    close(make_case([size + 1, 3 * size, 2 * size + 5, 200], [2, size, 7, 130], **shape))


def test_decodes_and_chunks_in_one_batch():
    close(make_case([1, 40, 17, 100, 3, 50], [1, 1, 1, 70, 3, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [[1, 1, 1], [33, 5, 70]], ids=["decode", "prefill"])
def test_half_width_pages(dtype, queries):
    case = make_case([33, 16, 100], queries, dtype=dtype)
    out = paged_attention(case.q, case.cache, 1, case.plan())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), case.expected(1)[0], atol=8e-3, rtol=8e-3)


def test_float32_queries_on_half_width_pages():
    case = make_case([33, 16, 100], [1, 1, 70], dtype=torch.bfloat16)
    close(Case(case.q.float(), case.cache, case.page_table, case.contexts, case.queries))


@pytest.mark.parametrize("queries", [[1, 1, 1], [40, 3, 100]], ids=["decode", "prefill"])
def test_logits_that_overflow_without_the_maximum_taken_off(queries):
    case = make_case([40, 70, 100], queries, scale=300.0)
    assert case.expected(0)[1].max() > 500  # exp(500) is far out of float32's range
    close(case, tolerance=2e-3)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_log_sum_exp(scale):
    case = make_case([1, 40, 17, 100, 3], [1, 1, 1, 70, 3], scale=scale)
    plan = case.plan()
    lse = torch.full(case.q.shape[:2], torch.nan)
    decode_attention(case.q[:3], case.cache, 2, plan, lse=lse[:3])
    prefill_attention(case.q[3:], case.cache, 2, plan, lse=lse[3:])
    torch.testing.assert_close(lse.double(), case.expected(2)[1], atol=1e-4, rtol=2e-6)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 20, "soft_cap": 3.0}, {"soft_cap": 0.5}], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_windows_soft_caps_and_several_queries(queries, options):
    case = make_case([3, 16, 17, 63, 100], [queries] * 5)
    lse = torch.full(case.q.shape[:2], torch.nan)
    out = decode_attention(case.q, case.cache, 2, case.plan(queries), lse, **options)
    expected, expected_lse = case.expected(2, **options)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(lse.double(), expected_lse, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("options", [{}, {"window": 20, "soft_cap": 3.0}], ids=str)
def test_decodes_of_several_queries_beside_chunks(options):
    case = make_case([40, 17, 100, 70], [3, 3, 70, 1])
    plan = case.plan(3)
    assert plan.num_decodes == 2
    out = paged_attention(case.q, case.cache, 2, plan, **options)
    torch.testing.assert_close(out.double(), case.expected(2, **options)[0], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("options", [{"window": -1}, {"soft_cap": -1.0}, {"soft_cap": float("nan")}], ids=str)
def test_an_option_out_of_range_is_refused(options):
    case = make_case([40, 20], [1, 1])
    with pytest.raises(ValueError, match=next(iter(options))):
        decode_attention(case.q, case.cache, 0, case.plan(), **options)


def test_a_sequence_does_not_depend_on_its_neighbours():
    case = make_case([5, 200, 64, 33, 150, 70], [1, 1, 1, 1, 90, 70])
    together = torch.split(paged_attention(case.q, case.cache, 1, case.plan()), case.queries)
    for index, expected in enumerate(together):
        alone = case.alone(index)
        out = paged_attention(alone.q, alone.cache, 1, alone.plan())
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


def test_neighbours_full_of_nan_do_no_harm():
    case = make_case([40, 40, 40, 40], [1, 1, 20, 20])
    expected = case.expected(0)[0]
    for ruined in (0, 2):
        case.cache[case.page_table[ruined, :3].long()] = torch.nan
    out = paged_attention(case.q, case.cache, 0, case.plan())
    fine = torch.cat((torch.tensor([1]), torch.arange(22, 42)))
    torch.testing.assert_close(out[fine].double(), expected[fine], atol=3e-6, rtol=3e-6)


def test_queries_that_are_views_of_a_fused_projection():
    case = make_case([40, 20, 50], [1, 1, 30])
    fused = torch.randn(32, 15, 64)
    fused[:, :9] = case.q
    out = paged_attention(fused[:, :9], case.cache, 0, case.plan())
    torch.testing.assert_close(out.double(), case.expected(0)[0], atol=3e-6, rtol=3e-6)


def test_inference_mode():
    with torch.inference_mode():
        close(make_case([40, 20, 50], [1, 1, 30]))


def test_a_plan_serves_pools_of_several_layers_and_dtypes():
    case = make_case([40, 20], [1, 1])
    plan = case.plan()
    wide = paged_attention(case.q, case.cache, 0, plan)
    one_layer = case.cache[:, 2:].contiguous()
    paged_attention(case.q, case.cache.half(), 0, plan)
    torch.testing.assert_close(
        paged_attention(case.q, one_layer, 0, plan).double(), case.expected(2)[0], atol=3e-6, rtol=3e-6
    )
    torch.testing.assert_close(paged_attention(case.q, case.cache, 0, plan), wide)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda case: {"q": case.q[:1]}, "q"),
        (lambda case: {"q": case.q[:, :8]}, "q"),
        (lambda case: {"q": case.q[..., :32]}, "q"),
        (lambda case: {"layer": LAYERS}, "layer"),
        (lambda case: {"layer": -1}, "layer"),
        (lambda case: {"cache": case.cache[:, :, :1]}, "cache"),
        (lambda case: {"cache": case.cache[:, :2]}, "cache"),
        (lambda case: {"cache": case.cache.view(-1, LAYERS, 2, 3, 32, 32)}, "cache"),
        (lambda case: {"cache": case.cache[:3]}, "page_table"),
    ],
)
def test_arguments_that_do_not_go_together(change, name):
    case = make_case([40, 20], [1, 1])
    arguments = {"q": case.q, "cache": case.cache, "layer": 0, "plan": case.plan()} | change(case)
    with pytest.raises(ValueError, match=name):
        paged_attention(**arguments)


@pytest.mark.parametrize("lse", [torch.empty(2, 8), torch.empty(2, 9).double(), torch.empty(9, 2).t()])
def test_a_wrong_lse_is_refused(lse):
    case = make_case([40, 20], [1, 1])
    with pytest.raises(ValueError, match="lse"):
        decode_attention(case.q, case.cache, 0, case.plan(), lse=lse)
    case = make_case([2], [2])
    with pytest.raises(ValueError, match="lse"):
        prefill_attention(case.q, case.cache, 0, case.plan(), lse=lse)

"""What the engine's benchmarks make of their raw figures: traces, whole batches, floors."""

import json

import pytest

from benchmarks.engine_cells import decode_floor_ms, prefill_floor_tokens_per_s, weights
from benchmarks.engine_trace import KINDS, Span, steps_of, summary
from benchmarks.record import write_result
from benchmarks.vllm_engine import Step, whole_batch

# Two steps of 10 us: products for 3, attention that starts 1 us early and ends 3 us later, an idle us, the last kernel.
STEP = ((0, 3, "nvjet_tst"), (2, 6, "decode_kernel"), (7, 10, "_advance_rows"))
TRACE = [Span(-1, 0, "_advance_rows")] + [Span(at + a, at + b, name) for at in (0, 10) for a, b, name in STEP]


def test_a_trace_is_cut_into_whole_steps():
    cut = [Span(18, 19, "_rms_norm")]
    assert [len(step) for step in steps_of(TRACE + [Span(a + 20, b + 20, n) for a, b, n in cut])] == [3, 3]


def test_times_add_up_where_kernels_overlap():
    found = summary(steps_of(TRACE))
    assert found["step_ms"] == pytest.approx(0.010)
    expected = {"sampling": 0, "attention": 0.003, "products": 0.003, "small kernels": 0.003}
    assert found["by_kind_ms"] == pytest.approx(expected)
    assert found["idle_share"] == pytest.approx(0.1)
    assert found["by_kernel_ms"] == pytest.approx({"nvjet_tst": 0.003, "decode_kernel": 0.003, "_advance_rows": 0.003})
    kinds = [list(KINDS)[kind] for kind in found["one_step"]["kind"]]
    assert (found["one_step"]["start_us"], kinds) == ([0, 2, 7], ["products", "attention", "small kernels"])


def test_a_batch_is_whole_where_every_step_brings_everybody_a_token():
    steps = [Step(at, 0.0, tokens) for at, tokens in enumerate((1, 2, 1, 2, 2, 2, 1))]
    assert whole_batch(steps, 2, 3) == 3
    with pytest.raises(RuntimeError, match="never whole for 4 steps"):
        whole_batch(steps, 2, 4)


def test_floors_of_an_8b_shape():
    assert weights() == 7_504_658_432  # 8.03e9 parameters less the embedding and the norms
    assert decode_floor_ms(1, 0, 4000) == pytest.approx(weights() * 2 / 4e9)
    kv = 64 * 1024 * 32 * 2 * 8 * 128 * 2
    assert decode_floor_ms(64, 1024, 4000) - decode_floor_ms(1, 0, 4000) == pytest.approx(kv / 4e9)
    # 6.98e9 weights and, of attention, 2 products of 4,096 numbers a layer with 512 tokens on average.
    flops = 2 * (weights() - 128256 * 4096) + 4 * 32 * 4096 * 512 + 2 * 128256 * 4096 / 1024
    assert prefill_floor_tokens_per_s(1024, 800) == pytest.approx(800e12 / flops)


def test_lists_of_numbers_are_kept_on_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.record.ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    result = {"numbers": [1, -2.5, 3e-07], "names": ["a, 1", "[2,  3]"], "rows": [{"x": [], "y": [[1], [2]]}]}
    text = write_result("some", result).read_text()
    assert '"numbers": [1, -2.5, 3e-07]' in text
    assert {key: json.loads(text)[key] for key in result} == result

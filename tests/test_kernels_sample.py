"""The twin of the sampling kernels against the rules in plain Python; their own tests are in the interpreter's."""

import math
from random import Random

import pytest
import torch

from engine.sampling_params import SamplingParams
from kernels.philox import uniform
from kernels.sample import sample, sample_triton, weigh
from kernels.sample_log_probs import log_probs, log_probs_triton
from kernels.sample_rows import IN_PROMPT, MAX_COUNT, SamplingRows, count_tokens
from kernels.sample_scale import PEAK_WEIGHT, STEP_BITS
from sample_cases import set_row
from sampling_oracle import changed, drawn, probabilities, random_case

CPU = torch.device("cpu")


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_follows_the_rules(scale):
    rng, vocab, count = Random(int(scale * 10)), 40, 300
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(count, vocab, generator=generator) * scale
    logits[::3] = logits[::3].round()  # ties
    rows = SamplingRows.neutral(count, vocab, 8, CPU, counts=True)
    cases = [random_case(rng, vocab) for _ in range(count)]
    for row, case in enumerate(cases):
        set_row(rows, row, *case)
    tied = 0
    for row, (token, (params, prompt, answer, ends)) in enumerate(
        zip(sample(logits, rows).tolist(), cases, strict=True)
    ):
        chances = probabilities(changed(logits[row].tolist(), params, prompt, answer, ends), params)
        expected, margin = drawn(chances, uniform(params.seed, len(prompt) + len(answer)))
        if token != expected:
            assert margin < 1e-6 or chances[token] == 0.0
            tied += 1
    assert tied <= count // 100


def test_frequencies():
    """20,000 draws: chi-square over the tokens that top-p keeps."""
    count, vocab = 20_000, 30
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2)).expand(count, -1)
    rows = SamplingRows.neutral(count, vocab, 0, CPU, counts=False)
    rows.temperature.fill_(0.8)
    rows.top_p.fill_(0.9)
    rows.positions.copy_(torch.arange(count))
    params = SamplingParams(temperature=0.8, top_p=0.9)
    expected = torch.tensor(probabilities(logits[0].tolist(), params), dtype=torch.float64) * count
    seen = sample(logits, rows).bincount(minlength=vocab)
    kept = expected > 0
    assert not seen[~kept].any()
    freedom = int(kept.sum()) - 1
    chi_square = float(((seen - expected) ** 2 / expected)[kept].sum())
    assert freedom - 4 * (2 * freedom) ** 0.5 < chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_weights_are_powers_of_two():
    steps = torch.arange(0, 10 << STEP_BITS, 9973)
    exact = 2.0 ** (40 - steps.double() / 2**STEP_BITS)
    assert ((weigh(steps) - exact) / exact).abs().max() < 2**-22
    assert (weigh(steps).diff() <= 0).all()
    assert weigh(torch.tensor([0, 63 << STEP_BITS])).tolist() == [PEAK_WEIGHT, 0]
    assert PEAK_WEIGHT * 2**18 < 2**63


def test_rows_without_a_choice():
    logits = torch.full((4, 9), -math.inf)
    logits[1, 5] = -1e30
    logits[2, 3:5] = math.nan
    logits[2, 6] = 2.0
    logits[3, 7:] = math.inf
    rows = SamplingRows.neutral(4, 9, 0, CPU, counts=False)
    for temperature in (0.0, 1.0):
        rows.temperature.fill_(temperature)
        ids = sample(logits, rows).tolist()
        assert ids[:3] == [0, 5, 6]
        assert ids[3] in (7, 8)


def test_a_ban_ends_by_itself():
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    rows = SamplingRows.neutral(1, 3, 2, CPU, counts=False)
    rows.bias_ids[0, 0], rows.bias[0, 0], rows.bias_until[0, 0] = 1, -math.inf, 12
    rows.positions.fill_(11)
    assert sample(logits, rows).tolist() == [2]
    rows.positions.add_(1)
    assert sample(logits, rows).tolist() == [1]


def test_counts():
    rows = SamplingRows.neutral(2, 5, 0, CPU, counts=True)
    assert rows.counts is not None
    count_tokens(rows.counts[0], torch.tensor([1, 1, 4]), torch.tensor([4, 4, 2]))
    count_tokens(rows.counts[1], torch.tensor([1]), torch.full((MAX_COUNT + 5,), 3))
    assert rows.counts.tolist() == [[0, IN_PROMPT, 1, 0, IN_PROMPT + 2], [0, IN_PROMPT, 0, MAX_COUNT, 0]]
    sample(torch.eye(5)[3:].flip(0), rows)  # tokens 4 and 3
    assert rows.counts.tolist() == [[0, IN_PROMPT, 1, 0, IN_PROMPT + 3], [0, IN_PROMPT, 0, MAX_COUNT, 0]]


def test_first_rows_are_views():
    rows = SamplingRows.neutral(4, 7, 2, CPU, counts=True)
    few = rows.first(2)
    rows.temperature.fill_(0.5)
    assert few.temperature.tolist() == [0.5, 0.5]
    few.check(torch.zeros(2, 7))
    assert few.counts is not None
    assert few.counts.shape == (2, 7)


def test_wrong_arguments_are_named():
    rows = SamplingRows.neutral(2, 7, 2, CPU, counts=True)
    with pytest.raises(ValueError, match="logits"):
        sample(torch.zeros(2, 7).half(), rows)
    with pytest.raises(ValueError, match="logits"):
        sample(torch.zeros(7, 2).T, rows)
    with pytest.raises(ValueError, match="temperature"):
        sample(torch.zeros(3, 7), rows)
    with pytest.raises(ValueError, match="counts"):
        sample(torch.zeros(2, 8), rows)
    with pytest.raises(ValueError, match="262145 tokens"):
        sample(torch.zeros(2, 2**18 + 1), rows)


def test_log_probs():
    logits = torch.tensor([[0.0, 2.0, 2.0, -math.inf], [1.0, -0.0, 0.0, 3.0]])
    found, top_ids, top = log_probs(logits, torch.tensor([0, 3]), 3)
    expected = logits.log_softmax(-1)
    assert found.tolist() == [expected[0, 0], expected[1, 3]]
    assert top_ids.tolist() == [[1, 2, 0], [3, 0, 1]]
    assert torch.equal(top, expected.gather(1, top_ids))
    with pytest.raises(ValueError, match="top"):
        log_probs(logits, torch.tensor([0, 3]), 5)
    with pytest.raises(ValueError, match="ids"):
        log_probs(logits, torch.tensor([0, 3]).int(), 1)
    with pytest.raises(ValueError, match="logits"):
        log_probs(logits.double(), torch.tensor([0, 3]), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("edits", [False, True])
def test_compiles_for_hopper_without_a_spill(monkeypatch, tmp_path, edits, dtype):
    pytest.importorskip("triton")
    from kernels_offline import HOPPER, assert_no_spills, compile_launches

    compiled = compile_launches(monkeypatch, tmp_path, HOPPER)
    logits = torch.zeros(2, 128256, dtype=dtype)
    sample_triton(logits, SamplingRows.neutral(2, 128256, 16 if edits else 0, CPU, counts=edits))
    log_probs_triton(logits, torch.zeros(2, dtype=torch.int64), 20)
    assert len(compiled) == 7
    for kernels in compiled.values():
        for kernel in kernels:
            assert_no_spills(kernel, tmp_path)

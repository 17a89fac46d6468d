"""On the device: bit for bit what the twin draws on the CPU, in any batch, and in a graph that follows its tensors."""

from dataclasses import fields

import pytest
import torch

from kernels.sample import sample, sample_torch
from kernels.sample_log_probs import log_probs, log_probs_torch
from kernels.sample_rows import SamplingRows
from sample_cases import ENTRIES, LOGITS, mixed_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on(device: str, rows: SamplingRows) -> SamplingRows:
    tensors = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return SamplingRows(**{name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [
        (1, torch.float32),
        (9999, torch.float32),
        (128256, torch.float32),
        (2**18, torch.float32),
        (49152, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kind", LOGITS)
def test_equals_the_twin(kind, vocab, dtype):
    count = 24
    twin_device = "cpu" if vocab < 10_000 else "cuda"  # sorting millions of logits on the CPU would take minutes
    logits = LOGITS[kind](count, vocab, seed=vocab).to(dtype)
    rows = mixed_rows(count, vocab, seed=vocab + 1)
    own, twin = on("cuda", rows), on(twin_device, rows)
    for _ in range(3):
        expected = sample_torch(logits.to(twin_device), twin)
        assert sample(logits.cuda(), own).tolist() == expected.tolist()
        assert torch.equal(own.counts.cpu(), twin.counts.cpu())
        own.positions.add_(1)
        twin.positions.add_(1)


def test_without_edits_and_greedy():
    logits = LOGITS["normal"](5, 128256, seed=3).cuda()
    rows = SamplingRows.neutral(5, 128256, 0, torch.device("cuda"), counts=False)
    assert torch.equal(sample(logits, rows), logits.argmax(-1))
    assert torch.equal(sample(logits, rows, greedy=True), logits.argmax(-1))


def test_a_row_is_alone():
    count, vocab = 200, 128256
    logits = LOGITS["normal"](count, vocab, seed=5).cuda()
    rows = on("cuda", mixed_rows(count, vocab, seed=6))
    before = rows.counts.clone()
    ids = sample(logits, rows).tolist()
    rows.counts.copy_(before)
    for i in range(0, count, 7):
        tensors = {field.name: getattr(rows, field.name)[i : i + 1] for field in fields(rows)}
        assert sample(logits[i : i + 1], SamplingRows(**tensors)).tolist() == [ids[i]]


def test_a_graph_follows_its_tensors():
    count, vocab = 16, 128256
    rows = SamplingRows.neutral(count, vocab, ENTRIES, torch.device("cuda"), counts=True)
    logits = LOGITS["normal"](count, vocab, seed=0).cuda()
    sample(logits, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = sample(logits, rows)
        rows.positions.add_(1)
    for seed, kind in enumerate(["normal", "peaked", "masked", "tied"]):
        new = on("cuda", mixed_rows(count, vocab, seed=seed))
        for field in fields(rows):
            getattr(rows, field.name).copy_(getattr(new, field.name))
        logits.copy_(LOGITS[kind](count, vocab, seed=seed))
        for _ in range(3):
            graph.replay()
            assert ids.tolist() == sample_torch(logits, new).tolist()
            new.positions.add_(1)


@pytest.mark.parametrize("cut", ["none", "top_k", "top_p", "min_p"])
def test_frequencies(cut):
    """65,536 draws of 256 tokens: chi-square with as many degrees of freedom as there are tokens kept."""
    count, draws, vocab = 256, 256, 256
    logits = LOGITS["normal"](1, vocab, seed=1).cuda().expand(count, -1)
    rows = SamplingRows.neutral(count, vocab, 0, torch.device("cuda"), counts=False)
    rows.temperature.fill_(1.5)
    rows.seeds.copy_(torch.arange(count))
    probabilities = (logits[0].double() / 1.5).softmax(-1)
    order = probabilities.sort(descending=True)
    if cut == "top_k":
        rows.top_k.fill_(20)
        probabilities = torch.where(probabilities >= order.values[19], probabilities, 0.0)
    elif cut == "top_p":
        rows.top_p.fill_(0.8)
        end = int((order.values.cumsum(0) < 0.8).sum())
        probabilities = torch.where(probabilities >= order.values[end], probabilities, 0.0)
    elif cut == "min_p":
        rows.min_p.fill_(0.03)
        probabilities = torch.where(probabilities >= 0.03 * order.values[0], probabilities, 0.0)
    seen = torch.zeros(vocab, dtype=torch.float64, device="cuda")
    for _ in range(draws):
        seen += sample(logits, rows).bincount(minlength=vocab)
        rows.positions.add_(1)
    expected = probabilities / probabilities.sum() * count * draws
    assert not seen[expected == 0].any()
    frequent = expected > 5
    freedom = int(frequent.sum()) - 1
    chi_square = float(((seen - expected) ** 2 / expected)[frequent].sum())
    assert freedom - 5 * (2 * freedom) ** 0.5 < chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("top", [0, 1, 20])
def test_log_probs(top, dtype):
    logits = LOGITS["normal"](9, 128256, seed=2).to(dtype)
    ids = torch.randint(128256, (9,))
    expected = log_probs_torch(logits, ids, top)
    out = log_probs(logits.cuda(), ids.cuda(), top)
    assert torch.equal(out[1].cpu(), expected[1])
    torch.testing.assert_close(out[0].cpu(), expected[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out[2].cpu(), expected[2], atol=2e-5, rtol=1e-5)

"""Random weights: the same everywhere for a seed, and of a size with which a model computes like a real one."""

import pytest
import torch

from engine.loader import load_model
from engine.random_source import RandomSource
from kernels.philox import philox4x32
from paged_sequences import Pages
from tiny_model import make_tiny_model

CPU = torch.device("cpu")
SHAPES = {
    "a.weight": (300, 1000),
    "b.weight": (300, 1000),
    "odd.weight": (7, 3),
    "q.bias": (4096,),
    "model.norm.weight": (64,),
    "layers.0.input_layernorm.weight": (64,),
}


def source(seed=0):
    return RandomSource(SHAPES, CPU, seed)


def test_uniform_with_the_spread_of_one_over_root_inputs():
    numbers = source().read(["a.weight"], torch.float32)
    assert numbers.mean().abs() < 4 * (1000 * 300_000) ** -0.5  # four standard errors
    assert numbers.std().item() == pytest.approx(1000**-0.5, rel=0.01)
    bound = (3 / 1000) ** 0.5
    assert bound * 0.999 < numbers.abs().max() < bound
    counts = torch.histc(numbers, 100, -bound, bound)
    assert ((counts - 3000) ** 2 / 3000).sum() < 161  # chi-square with 99 degrees of freedom: 0.9999


def test_norms_are_ones_and_biases_are_not():
    for name in ("model.norm.weight", "layers.0.input_layernorm.weight"):
        assert (source().read([name], torch.bfloat16) == 1).all()
    assert source().read(["q.bias"], torch.float32).std().item() == pytest.approx(4096**-0.5, rel=0.05)


def test_a_number_depends_on_seed_name_and_place_alone(monkeypatch):
    whole = source().read(["a.weight", "b.weight"], torch.float32)
    torch.testing.assert_close(whole[300:], source().read(["b.weight"], torch.float32), rtol=0, atol=0)
    monkeypatch.setattr("engine.random_source._PIECE", {"cpu": 100})
    again = source().read(["a.weight", "b.weight"], torch.float32)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    other = source(seed=1).read(["a.weight"], torch.float32)
    for one, two in ((whole[:300], whole[300:]), (whole[:300], other)):
        assert abs(torch.corrcoef(torch.stack((one.flatten(), two.flatten())))[0, 1]) < 0.01


def test_a_narrower_dtype_is_the_same_rounded():
    wide = source().read(["odd.weight"], torch.float32)
    torch.testing.assert_close(source().read(["odd.weight"], torch.bfloat16), wide.bfloat16(), rtol=0, atol=0)


def test_known_numbers():
    """Two releases that disagree would compute from each other's pages: this must not change."""
    [[first, second, third]] = source().read(["odd.weight"], torch.float32)[:1].tolist()
    words = philox4x32(0, 0, 0, 0, 0x400A7030, 0xEBFF467)  # the key: blake2b of "0 odd.weight"
    halves = [words[0] & 0xFFFF, words[0] >> 16, words[1] & 0xFFFF]
    assert [first, second, third] == pytest.approx([(half + 0.5) / 2**15 - 1 for half in halves])


@pytest.mark.parametrize(
    "options",
    [{}, {"hidden": 512, "ffn": 1024, "layers": 8, "head_dim": 64}, {"tied": True}, {"architecture": "qwen2"}],
    ids=str,
)
def test_logits_of_a_random_model(tmp_path, options):
    """Spread by about 1 whatever the width and depth, and what comes next depends on the whole context."""
    path = make_tiny_model(tmp_path, **options)
    (path / "model.safetensors").unlink()  # nothing but config.json is read
    model = load_model(path, "float32", "cpu", load="random").model
    ids = list(range(40, 100))
    [one], [two] = (Pages(model, 16).run([prompt], [100]) for prompt in (ids, [7, *ids[1:]]))
    assert one.isfinite().all()
    assert 0.5 < one.std() < 2
    assert (one[-1] - two[-1]).abs().max() > 0.02  # one token of 60 has changed, 60 tokens ago

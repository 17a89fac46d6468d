"""Angles are transformers', for every kind of scaling that is built and the sizes of real models."""

import importlib
import json
import warnings

import pytest
import torch

from engine.model_config import ModelConfig
from engine.rope_frequencies import attention_factor, inverse_frequencies
from published_configs import PUBLISHED, QWEN_YARN
from tiny_model import make_tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def theirs(path):
    """(inverse frequencies, attention factor) of transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations are not ours
        transformers = importlib.import_module("transformers")
        rope = importlib.import_module("transformers.modeling_rope_utils")
        config = transformers.AutoConfig.from_pretrained(path)
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        return rope.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    return llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)


def assert_same(path):
    config = ModelConfig.from_dir(path)
    frequencies, factor = theirs(path)
    # The last bit of a float32: the order of a division and a product is not the same everywhere.
    torch.testing.assert_close(inverse_frequencies(config), frequencies, rtol=1.2e-7, atol=0)
    assert attention_factor(config) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("changes", [{}, QWEN_YARN], ids=["as published", "yarn"])
@pytest.mark.parametrize("name", ["Llama-2-7b", "Llama-3.1-8B", "Llama-3.2-1B", "SmolLM2-135M", "Qwen3-8B"])
def test_published_models(tmp_path, name, changes):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][0] | changes))
    assert_same(tmp_path)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        LLAMA3,
        LLAMA3 | {"factor": 32.0, "low_freq_factor": 2.0},
        YARN,
        YARN | {"factor": 1.0},
        YARN | {"truncate": False},
        YARN | {"attention_factor": 1.25},
        YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
        YARN | {"mscale": 0.707},  # alone it says nothing
        YARN | {"beta_fast": 20.0, "beta_slow": 2.5},
        YARN | {"original_max_position_embeddings": 16},  # every dimension is slow
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_scalings(tmp_path, scaling, head_dim):
    assert_same(make_tiny_model(tmp_path, head_dim=head_dim, rope_scaling=scaling))


def test_long_waves_are_slowed_and_short_ones_kept(tmp_path):
    plain = inverse_frequencies(ModelConfig.from_dir(make_tiny_model(tmp_path / "a")))
    assert plain.tolist() == pytest.approx([10000.0 ** (-i / 8) for i in range(8)])
    for factor, scaling in ((8, LLAMA3), (4, YARN)):
        config = ModelConfig.from_dir(make_tiny_model(tmp_path / f"{factor}", rope_scaling=scaling))
        ratios = (inverse_frequencies(config) / plain).tolist()
        assert ratios[0] == pytest.approx(1.0)
        assert ratios[-1] == pytest.approx(1 / factor)
        assert ratios == sorted(ratios, reverse=True)

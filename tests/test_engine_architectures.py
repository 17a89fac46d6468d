"""Every family's logits are transformers', in chunks and single tokens mixed, over shuffled pages.

A new architecture adds its cases here.
"""

import random

import pytest

import oracle
from engine.loader import load_model
from paged_sequences import Pages, assert_close
from tiny_model import make_tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
QWEN_WINDOW = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 1, "layers": 3}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES = [
    {"architecture": "llama"},
    {"architecture": "llama", "tied": True},
    {"architecture": "mistral", "sliding_window": None},
    {"architecture": "qwen2"},
    {"architecture": "qwen2", "tied": True},
    {"architecture": "qwen3"},
    {"architecture": "qwen3", "tied": True, "hidden": 96},
]
GROUPS = [
    {"heads": 8, "kv_heads": 1},
    {"heads": 4, "kv_heads": 4},
    {"heads": 6, "kv_heads": 2, "hidden": 96, "head_dim": 32, "ffn": 160},  # 3 query heads to one of K and V
    {"heads": 7, "kv_heads": 1, "hidden": 112, "architecture": "qwen2"},
    {"heads": 10, "kv_heads": 2, "hidden": 80, "head_dim": 24, "architecture": "qwen3"},
]
# These change what is computed from the same weights.
STRETCHED = [
    {"rope_scaling": LLAMA3},
    {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": YARN},
    {"rope_parameters": YARN | {"rope_theta": 500.0}, "architecture": "qwen3"},
    {"rope_scaling": YARN | {"attention_factor": 1.5, "truncate": False}, "architecture": "qwen2"},
    {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "beta_fast": 4.0, "beta_slow": 0.5}},
]
WINDOWS = [
    {"architecture": "mistral", "sliding_window": 1},
    {"architecture": "mistral", "sliding_window": 16},
    {"architecture": "mistral", "sliding_window": 37, "heads": 6, "kv_heads": 2, "hidden": 96},
    {"architecture": "mistral", "sliding_window": 150, "rope_scaling": YARN},
    {"architecture": "qwen2", **QWEN_WINDOW},
    {"architecture": "qwen3", **QWEN_WINDOW},
    {"architecture": "qwen3", **QWEN_WINDOW, "layer_types": MIXED_LAYERS},
]


def sequences(*lengths):
    rng = random.Random(1)
    return [[rng.randrange(300) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("options", [*FAMILIES, *GROUPS, *STRETCHED, *WINDOWS], ids=str)
def test_logits(tmp_path, options):
    path = make_tiny_model(tmp_path, **options)
    model = load_model(path, "float32", "cpu").model
    several = sequences(200, 33, 16, 1)
    theirs = [oracle.logits(path, ids) for ids in several]
    for chunks in ([1, 7, 32], [200]):
        for ours, wanted in zip(Pages(model, 16).run(several, chunks), theirs, strict=True):
            assert_close(ours, wanted, 2e-4)


@pytest.mark.parametrize("options", [*STRETCHED, *WINDOWS], ids=str)
def test_what_the_options_change_shows(tmp_path, options):
    """Were one of them passed over, `test_logits` would see it: without it transformers says something else."""
    changed = {"rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "layer_types"}
    plain = {name: value for name, value in options.items() if name not in changed} | {"sliding_window": None}
    [ids] = sequences(200)
    with_them = oracle.logits(make_tiny_model(tmp_path / "with", **options), ids)
    without = oracle.logits(make_tiny_model(tmp_path / "without", **plain), ids)
    assert (with_them - without).abs().max() > 0.2

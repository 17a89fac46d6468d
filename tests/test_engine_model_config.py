"""config.json of the Llama family, and what is said where it cannot be used."""

import json
import re

import pytest

from engine.model_config import Llama3Scaling, ModelConfig
from engine.rope_frequencies import inverse_frequencies
from protos.errors import ModelUnusable
from tiny_model import EOS_ID, make_tiny_model


def change(path, **fields):
    file = path / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def test_fields(tmp_path):
    config = ModelConfig.from_dir(make_tiny_model(tmp_path, hidden=64, heads=4, kv_heads=2, ffn=96, layers=3))
    assert (config.architecture, config.hidden, config.layers, config.heads) == ("llama", 64, 3, 4)
    assert (config.kv_heads, config.head_dim, config.ffn, config.max_positions) == (2, 16, 96, 2048)
    assert (config.rope_theta, config.rms_eps, config.rope_scaling) == (10000.0, 1e-5, None)
    assert (config.tie_embeddings, config.qkv_bias, config.qk_norm) == (False, False, False)
    assert (config.bos_token_id, config.eos_token_ids) == (0, (EOS_ID,))


def test_defaults_are_those_of_transformers(tmp_path):
    make_tiny_model(tmp_path)
    change(tmp_path, num_key_value_heads=..., head_dim=..., rope_theta=..., tie_word_embeddings=..., hidden_act=...)
    config = ModelConfig.from_dir(tmp_path)
    assert (config.kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert config.tie_embeddings is False


def test_architectures_differ_in_bias_and_norms(tmp_path):
    qwen2 = ModelConfig.from_dir(make_tiny_model(tmp_path / "2", architecture="qwen2"))
    qwen3 = ModelConfig.from_dir(make_tiny_model(tmp_path / "3", architecture="qwen3"))
    assert (qwen2.qkv_bias, qwen2.qk_norm) == (True, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm) == (False, True)


def test_eos_ids_of_generation_config_come_first(tmp_path):
    make_tiny_model(tmp_path)
    change(tmp_path, eos_token_id=[7, 8])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").unlink()
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (7, 8)
    change(tmp_path, eos_token_id=None)
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == ()


@pytest.mark.parametrize(
    ("architecture", "fields", "longest"),
    [
        ("mistral", {"sliding_window": 100}, 100),
        ("mistral", {"sliding_window": None}, 2048),
        ("mistral", {"sliding_window": 4096}, 2048),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, 2048),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True}, 100),
    ],
)
def test_a_sliding_window_ends_the_longest_sequence(tmp_path, architecture, fields, longest):
    make_tiny_model(tmp_path, architecture=architecture, **fields)
    assert ModelConfig.from_dir(tmp_path).max_positions == longest


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def test_rope_of_both_generations_of_files(tmp_path):
    make_tiny_model(tmp_path, rope_scaling=SCALING, rope_theta=500.0)
    before = ModelConfig.from_dir(tmp_path)
    change(tmp_path, rope_scaling=..., rope_theta=..., rope_parameters=SCALING | {"rope_theta": 500.0})
    after = ModelConfig.from_dir(tmp_path)
    assert before == after
    assert after.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 512)


def test_rope_identity_tells_rotations_apart(tmp_path):
    configs = [
        ModelConfig.from_dir(make_tiny_model(tmp_path / name, **options))
        for name, options in {"a": {}, "b": {"rope_theta": 5e5}, "c": {"rope_scaling": SCALING}}.items()
    ]
    assert len({config.rope_identity for config in configs}) == 3
    assert configs[0].rope_identity == ModelConfig.from_dir(tmp_path / "a").rope_identity


def test_inverse_frequencies(tmp_path):
    plain = inverse_frequencies(ModelConfig.from_dir(make_tiny_model(tmp_path / "a")))
    assert plain.tolist() == pytest.approx([10000.0 ** (-i / 8) for i in range(8)])
    scaled = inverse_frequencies(ModelConfig.from_dir(make_tiny_model(tmp_path / "b", rope_scaling=SCALING)))
    ratios = (scaled / plain).tolist()
    assert ratios[0] == 1.0  # short waves stay
    assert ratios[-1] == pytest.approx(1 / 8)  # long ones are slowed
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba', which is not built: choose"),
        ({"model_type": ...}, "architecture None"),
        ({"hidden_size": ...}, "no field 'hidden_size'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"num_key_value_heads": 3}, "4 heads of 16 do not fit 3 kv heads"),
        ({"head_dim": 15}, "4 heads of 15"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not built"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "no field 'factor'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not built"),
        ({"attention_bias": True}, "attention_bias = True is not built"),
        ({"mlp_bias": True}, "mlp_bias = True is not built"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
    ids=str,
)
def test_what_cannot_be_used(tmp_path, fields, message):
    make_tiny_model(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(ModelUnusable, match=re.escape(str(tmp_path))) as raised:
        ModelConfig.from_dir(tmp_path)
    assert message in str(raised.value)
    assert raised.value.stage == "load"


@pytest.mark.parametrize("value", ["2", [2, None], -1, 2.5], ids=str)
def test_eos_ids_that_are_none(tmp_path, value):
    make_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ModelUnusable, match=r"generation_config.json: eos_token_id is .*fetch"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe"], ids=str)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_missing_and_broken_files(tmp_path, name, content):
    make_tiny_model(tmp_path)
    file = tmp_path / name
    if content is None:
        file.unlink()
        if name == "generation_config.json":  # it may be missing
            assert ModelConfig.from_dir(tmp_path).eos_token_ids == (EOS_ID,)
            return
    else:
        file.write_bytes(content)
    with pytest.raises(ModelUnusable, match=f"{name}.*(a model directory holds|fetch the model's files again)"):
        ModelConfig.from_dir(tmp_path)

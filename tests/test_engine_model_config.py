"""config.json of the Llama family, and what is said where it cannot be used."""

import json
import re

import pytest

from engine.model_config import ModelConfig
from engine.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from protos.errors import ModelUnusable
from published_configs import PUBLISHED, QWEN_YARN
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


def published(path, name, **changes):
    (path / "config.json").write_text(json.dumps(PUBLISHED[name][0] | changes))
    return ModelConfig.from_dir(path)


@pytest.mark.parametrize(
    ("name", "sizes", "rope_scaling"),
    [
        ("Llama-2-7b", (32, 32, 128, 32000, 4096), None),
        ("Llama-3.1-8B", (32, 8, 128, 128256, 131072), Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ("Llama-3.2-1B", (32, 8, 64, 128256, 131072), Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        ("SmolLM2-135M", (9, 3, 64, 49152, 8192), None),
        ("Mistral-7B-v0.1", (32, 8, 128, 32000, 32768), None),
        ("Mistral-7B-v0.3", (32, 8, 128, 32768, 32768), None),
        ("Qwen2.5-0.5B", (14, 2, 64, 151936, 32768), None),
        ("Qwen2.5-7B", (28, 4, 128, 152064, 131072), None),
        ("Qwen3-0.6B", (16, 8, 128, 151936, 40960), None),
        ("Qwen3-8B", (32, 8, 128, 151936, 40960), None),
    ],
)
def test_published_configs(tmp_path, name, sizes, rope_scaling):
    config = published(tmp_path, name)
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab, config.max_positions) == sizes
    assert config.rope_scaling == rope_scaling
    assert set(config.windows) == ({4096} if name == "Mistral-7B-v0.1" else {0})


def test_qwen_with_yarn_reaches_four_times_as_far(tmp_path):
    for name in ("Qwen3-8B", "Qwen2.5-0.5B"):
        config = published(tmp_path, name, **QWEN_YARN)
        assert config.max_positions == 131072
        assert config.rope_scaling == YarnScaling(4.0, 32768, 32.0, 1.0, pytest.approx(1.1386294), True)


@pytest.mark.parametrize(
    ("architecture", "fields", "windows"),
    [
        ("mistral", {"sliding_window": 100}, [100, 100, 100]),
        ("mistral", {"sliding_window": None}, [0, 0, 0]),
        ("mistral", {}, [0, 0, 0]),  # 4,096 by default, and the context has 2,048
        ("mistral", {"max_position_embeddings": 5000}, [4096, 4096, 4096]),
        ("mistral", {"sliding_window": 2047}, [2047, 2047, 2047]),
        ("mistral", {"sliding_window": 2048}, [0, 0, 0]),
        ("qwen2", {"sliding_window": 100}, [0, 0, 0]),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, [0, 0, 0]),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True}, [0, 0, 0]),  # from layer 28 on
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}, [0, 100, 100]),
        ("qwen3", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 0}, [100, 100, 100]),
        (
            "qwen3",
            {
                "sliding_window": 100,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            [100, 0, 100],
        ),
        ("llama", {"layer_types": ["full_attention"] * 3}, [0, 0, 0]),
    ],
)
def test_windows_by_layer(tmp_path, architecture, fields, windows):
    make_tiny_model(tmp_path, architecture=architecture, layers=3, **fields)
    assert list(ModelConfig.from_dir(tmp_path).windows) == windows


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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("fields", "scaling", "longest"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, LinearScaling(2.0), 4096),
        ({"rope_scaling": YARN}, YarnScaling(4.0, 512, 32.0, 1.0, pytest.approx(1.1386294), True), 2048),
        ({"rope_parameters": YARN}, YarnScaling(4.0, 512, 32.0, 1.0, pytest.approx(1.1386294), True), 2048),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "truncate": False}},
            YarnScaling(4.0, 2048, 32.0, 1.0, 1.5, False),  # the file's own length is the original one
            8192,
        ),
        (
            {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 8, "beta_slow": 2}},
            YarnScaling(4.0, 512, 8.0, 2.0, pytest.approx(1.0970406 / 1.1386294), True),
            2048,
        ),
        ({"rope_scaling": YARN | {"factor": 0.5}}, YarnScaling(0.5, 512, 32.0, 1.0, 1.0, True), 2048),
        ({"rope_scaling": {"rope_type": "default"}}, None, 2048),
        ({"rope_scaling": {}}, None, 2048),
        ({"rope_scaling": YARN, "rope_parameters": SCALING}, YarnScaling, 2048),  # in transformers' order
    ],
)
def test_rope_scaling(tmp_path, fields, scaling, longest):
    config = ModelConfig.from_dir(make_tiny_model(tmp_path, **fields))
    assert config.rope_scaling == scaling or type(config.rope_scaling) is scaling
    assert config.max_positions == longest


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
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' turns keys by"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not built: default, linear"),
        ({"rope_scaling": {"type": "yarn"}}, "no field 'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor is '4', not a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": "no"}}, "truncate is 'no', not true or false"),
        ({"rope_scaling": [1]}, "rope_parameters is [1], not an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters = {'full_attention'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not built"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not built"),
        ({"rope_parameters": {"mrope_section": [16, 24, 24]}}, "mrope_section = [16, 24, 24] is not built"),
        ({"use_mrope": True}, "use_mrope = True is not built"),
        ({"rope_interleaved": True}, "rope_interleaved = True is not built"),
        ({"sliding_window": 64}, "sliding_window = 64 is not built"),  # nobody agrees on what it means in a llama
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types asks for a window that sliding_window and"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers of 2"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types names 'chunked_attention', which"),
        ({"dual_chunk_attention_config": {"chunk_size": 2}}, "dual_chunk_attention_config = {'chunk_size': 2} is not"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "no field 'factor'"),
        ({"rope_scaling": SCALING | {"low_freq_factor": 4.0}}, "low_freq_factor must be below high_freq_factor"),
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

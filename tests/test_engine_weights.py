"""Weights come out of one file or of several, in any dtype, and nothing missing or misshapen passes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.model_config import ModelConfig
from engine.weights import load_weights
from kernels.linear import linear
from protos.errors import ModelUnusable
from tiny_model import make_tiny_model

CPU = torch.device("cpu")


def load(path, dtype=torch.float32):
    return load_weights(path, ModelConfig.from_dir(path), dtype, CPU)


def matrix(weight, columns):
    """The [out, in] matrix that a prepared weight stands for."""
    return linear(torch.eye(columns), weight).t()


def assert_same(one, two):
    torch.testing.assert_close(one.embedding, two.embedding)
    torch.testing.assert_close(one.final_norm, two.final_norm)
    torch.testing.assert_close(matrix(one.lm_head, 64), matrix(two.lm_head, 64))
    for ours, theirs in zip(one.layers, two.layers, strict=True):
        torch.testing.assert_close(matrix(ours.qkv, 64), matrix(theirs.qkv, 64))
        torch.testing.assert_close(matrix(ours.down, 128), matrix(theirs.down, 128))
        torch.testing.assert_close(ours.ffn_norm, theirs.ffn_norm)


def test_fused_matrices(tmp_path):
    path = make_tiny_model(tmp_path, architecture="qwen2", tied=True)
    stored = load_file(path / "model.safetensors")
    weights = load(path)
    layer, prefix = weights.layers[1], "model.layers.1."
    qkv = [stored[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
    torch.testing.assert_close(matrix(layer.qkv, 64), torch.cat(qkv))
    bias = [stored[f"{prefix}self_attn.{part}_proj.bias"] for part in "qkv"]
    torch.testing.assert_close(layer.qkv_bias, torch.cat(bias))
    gate_up = [stored[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    torch.testing.assert_close(matrix(layer.gate_up, 64), torch.cat(gate_up))
    torch.testing.assert_close(matrix(layer.output, 64), stored[f"{prefix}self_attn.o_proj.weight"])
    torch.testing.assert_close(matrix(weights.lm_head, 64), stored["model.embed_tokens.weight"])
    assert layer.q_norm is None


def test_head_norms(tmp_path):
    path = make_tiny_model(tmp_path, architecture="qwen3")
    layer = load(path).layers[0]
    stored = load_file(path / "model.safetensors")
    torch.testing.assert_close(layer.q_norm, stored["model.layers.0.self_attn.q_norm.weight"])
    torch.testing.assert_close(layer.k_norm, stored["model.layers.0.self_attn.k_norm.weight"])
    assert layer.qkv_bias is None


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_are_one_model(tmp_path, shards):
    assert_same(load(make_tiny_model(tmp_path / "a")), load(make_tiny_model(tmp_path / "b", shards=shards)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype, stored_as):
    path = make_tiny_model(tmp_path)
    stored = {name: tensor.to(stored_as) for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(stored, path / "model.safetensors")
    weights = load(path, dtype)
    assert weights.embedding.dtype == dtype
    assert weights.final_norm.dtype == weights.layers[0].input_norm.dtype == torch.float32  # as a CPU computes
    torch.testing.assert_close(weights.embedding, stored["model.embed_tokens.weight"].to(dtype))
    head = linear(torch.eye(64, dtype=dtype), weights.lm_head).t()
    torch.testing.assert_close(head, stored["lm_head.weight"].to(dtype), rtol=0.01, atol=1e-3)


def test_the_embedding_stays_in_the_mapped_file(tmp_path):
    path = make_tiny_model(tmp_path)
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()
    weights = load(path)
    address = weights.embedding.data_ptr()
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if str(path) in line]
    assert any(int(start, 16) <= address < int(end, 16) for start, end in spans)


def rewrite(path, change):
    stored = load_file(path / "model.safetensors")
    change(stored)
    save_file(stored, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "has no weight 'model.norm.weight': fetch"),
        (lambda w: w.pop("lm_head.weight"), "has no weight 'lm_head.weight': fetch"),
        (lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"), r"has no weight 'model.layers.1.self_attn.k_proj"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(63)}),
            r"norm.weight is \[63\], but .* \[64\]: fetch",
        ),
        (
            lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.ones(127, 64)}),
            r"gate_proj.weight \+ .*up_proj.weight is \[128, 64\], \[127, 64\], but config.json asks for \[256, 64\]",
        ),
        (
            lambda w: w.update({"model.layers.0.mlp.down_proj.weight": torch.ones(64, 32, dtype=torch.uint8)}),
            "down_proj.weight is stored as torch.uint8, a quantisation that is not built: choose",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    path = make_tiny_model(tmp_path)
    rewrite(path, change)
    with pytest.raises(ModelUnusable, match=message):
        load(path)


def test_files_cut_short(tmp_path):
    path = make_tiny_model(tmp_path)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for end in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(ModelUnusable, match=r"model.safetensors is broken or cut short.*: fetch the model's files"):
            load(path)


def test_a_shard_that_is_missing(tmp_path):
    path = make_tiny_model(tmp_path, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelUnusable, match=r"lacks model-00002-of-00003.safetensors"):
        load(path)


def test_config_that_asks_for_another_model(tmp_path):
    path = make_tiny_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelUnusable, match=r"has no weight 'model.layers.2"):
        load(path)

"""Which tensors a configuration means, and how they are put together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.model_config import ModelConfig
from engine.safetensors_source import SafetensorsSource
from engine.weights import assemble, stored_shapes
from kernels.linear import linear
from published_configs import PUBLISHED
from tiny_model import make_tiny_model

ROOT = Path(__file__).parent.parent


def load(path, dtype=torch.float32):
    config = ModelConfig.from_dir(path)
    return assemble(config, SafetensorsSource(path, stored_shapes(config), torch.device("cpu"), print), dtype)


def matrix(weight, columns):
    """The [out, in] matrix that a prepared weight stands for."""
    return linear(torch.eye(columns), weight).t()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters(tmp_path, name):
    settings, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    shapes = stored_shapes(ModelConfig.from_dir(tmp_path))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


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
    torch.testing.assert_close(matrix(layer.down, 128), stored[f"{prefix}mlp.down_proj.weight"])
    torch.testing.assert_close(layer.input_norm, stored[f"{prefix}input_layernorm.weight"])
    torch.testing.assert_close(layer.ffn_norm, stored[f"{prefix}post_attention_layernorm.weight"])
    torch.testing.assert_close(matrix(weights.lm_head, 64), stored["model.embed_tokens.weight"])
    assert layer.q_norm is None


def test_a_head_of_its_own(tmp_path):
    path = make_tiny_model(tmp_path)
    stored = load_file(path / "model.safetensors")
    torch.testing.assert_close(matrix(load(path).lm_head, 64), stored["lm_head.weight"])


def test_head_norms(tmp_path):
    path = make_tiny_model(tmp_path, architecture="qwen3")
    layer = load(path).layers[0]
    stored = load_file(path / "model.safetensors")
    torch.testing.assert_close(layer.q_norm, stored["model.layers.0.self_attn.q_norm.weight"])
    torch.testing.assert_close(layer.k_norm, stored["model.layers.0.self_attn.k_norm.weight"])
    assert layer.qkv_bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype):
    path = make_tiny_model(tmp_path)
    weights = load(path, dtype)
    assert weights.embedding.dtype == dtype
    assert weights.final_norm.dtype == weights.layers[0].input_norm.dtype == torch.float32  # as a CPU computes
    head = linear(torch.eye(64, dtype=dtype), weights.lm_head).t()
    stored = load_file(path / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(head, stored.to(dtype), rtol=0.01, atol=1e-3)


def test_the_benchmarks_shape_is_llama_3_8b(tmp_path):
    shutil.copyfile(ROOT / "benchmarks" / "configs" / "llama-3-8b.json", tmp_path / "config.json")
    shapes = stored_shapes(ModelConfig.from_dir(tmp_path))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == PUBLISHED["Llama-3.1-8B"][1]

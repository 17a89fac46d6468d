"""Weights come out of one file or of several, in any dtype, and nothing missing, left over or misshapen passes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import safetensors_source
from engine.model_config import ModelConfig
from engine.safetensors_source import SafetensorsSource
from engine.weights import stored_shapes
from protos.errors import ModelUnusable
from tiny_model import make_tiny_model

CPU = torch.device("cpu")
GATE_UP = ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"]


def opened(path, progress=print):
    return SafetensorsSource(path, stored_shapes(ModelConfig.from_dir(path)), CPU, progress)


def rewrite(path, change):
    stored = load_file(path / "model.safetensors")
    change(stored)
    save_file(stored, path / "model.safetensors")


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_one_or_several_below_each_other(tmp_path, shards):
    stored = load_file(make_tiny_model(tmp_path / "whole") / "model.safetensors")
    source = opened(make_tiny_model(tmp_path / "shards", shards=shards))
    for name, tensor in stored.items():
        torch.testing.assert_close(source.read([name], torch.float32), tensor, rtol=0, atol=0)
    fused = source.read(GATE_UP, torch.float32)
    torch.testing.assert_close(fused, torch.cat([stored[name] for name in GATE_UP]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_as", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype, stored_as):
    path = make_tiny_model(tmp_path)
    rewrite(path, lambda w: w.update({name: tensor.to(stored_as) for name, tensor in w.items()}))
    stored, source = load_file(path / "model.safetensors"), opened(path)
    for names in (["lm_head.weight"], GATE_UP):
        wanted = torch.cat([stored[name] for name in names]).to(dtype)
        torch.testing.assert_close(source.read(names, dtype), wanted, rtol=0, atol=0)


def test_what_is_read_alone_stays_in_the_mapped_file(tmp_path):
    path = make_tiny_model(tmp_path)
    embedding = opened(path).read(["model.embed_tokens.weight"], torch.float32)
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if str(path) in line]
    assert any(int(start, 16) <= embedding.data_ptr() < int(end, 16) for start, end in spans)


def test_progress_in_gigabytes(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(safetensors_source.time, "monotonic", lambda: next(clock) / 2)
    monkeypatch.setattr(safetensors_source, "_TELL_EVERY_S", 2.0)
    path, lines = make_tiny_model(tmp_path, hidden=512, ffn=4096, layers=1), []
    source = opened(path, lines.append)
    for _ in range(6):
        source.read(["model.layers.0.mlp.down_proj.weight"], torch.float32)
    total = (path / "model.safetensors").stat().st_size / 1e9
    read = 512 * 4096 * 4 / 1e9
    assert lines[0] == f"loading the weights: {4 * read:.1f} of {total:.1f} GB"
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "lacks model.norm.weight: fetch"),
        (lambda w: w.pop("lm_head.weight"), "lacks lm_head.weight: fetch"),
        (
            lambda w: [w.pop(name) for name in list(w) if "layers.1." in name],
            r"lacks model.layers.1.self_attn.q_proj.weight, .*v_proj.weight, .*o_proj.weight and 5 more: fetch",
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            "also holds model.layers.0.self_attn.q_proj.bias, of which config.json says nothing: this kind of model",
        ),
        (
            lambda w: w.update({"model.layers.2.input_layernorm.weight": torch.ones(64)}),
            "also holds model.layers.2.input_layernorm.weight",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(63)}),
            r"holds model.norm.weight \[63\] and not \[64\], as config.json has it: fetch",
        ),
        (
            lambda w: w.update({GATE_UP[1]: torch.ones(127, 64), GATE_UP[0]: torch.ones(129, 64)}),
            r"gate_proj.weight \[129, 64\] and not \[128, 64\], .*up_proj.weight \[127, 64\] and not \[128, 64\]",
        ),
        (
            lambda w: w.update({GATE_UP[0]: torch.ones(128, 64, dtype=torch.uint8)}),
            "gate_proj.weight as U8, a quantisation that is not built: choose the model in float32",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    path = make_tiny_model(tmp_path)
    rewrite(path, change)
    with pytest.raises(ModelUnusable, match=message) as raised:
        opened(path)
    assert str(path) in str(raised.value)


def test_what_old_files_hold_besides(tmp_path):
    """A tied head stored all the same, and rotary frequencies: transformers passes over them too."""
    path = make_tiny_model(tmp_path, tied=True)
    extra = {
        "lm_head.weight": torch.ones(3, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    rewrite(path, lambda w: w.update(extra))
    opened(path)


def test_files_cut_short(tmp_path):
    path = make_tiny_model(tmp_path)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for end in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(ModelUnusable, match=r"model.safetensors is broken or cut short.*: fetch the model's files"):
            opened(path)


def test_a_shard_that_is_missing(tmp_path):
    path = make_tiny_model(tmp_path, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelUnusable, match=r"lacks model-00002-of-00003.safetensors"):
        opened(path)


def test_config_that_asks_for_another_model(tmp_path):
    path = make_tiny_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelUnusable, match=r"lacks model.layers.2.*and 5 more"):
        opened(path)

"""Loading a directory in one call."""

import pytest
import torch

from engine import loader
from engine.fingerprint import model_fingerprint, random_fingerprint
from engine.loader import load_model
from engine.model_config import ModelConfig
from protos.errors import FixTheSetup, ModelUnusable
from tiny_model import make_tiny_model


def test_what_is_loaded(tmp_path):
    path = make_tiny_model(tmp_path)
    loaded = load_model(path, "float32", "cpu")
    assert loaded.config == ModelConfig.from_dir(path) == loaded.model.config
    assert loaded.fingerprint == model_fingerprint(path)
    assert load_model(str(path), "bfloat16", "cpu").model.dtype == torch.bfloat16
    assert load_model(path, "float16", "cpu").model.dtype == torch.float16


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_what_is_fast_here(tmp_path, monkeypatch, fast, dtype):
    path = make_tiny_model(tmp_path)
    assert load_model(path, "auto", "cpu").model.dtype in (torch.bfloat16, torch.float32)
    monkeypatch.setattr(loader, "has_float16_tiles", lambda: fast)
    assert load_model(path, "auto", "cpu").model.dtype == dtype


def test_random_weights_need_nothing_but_a_config(tmp_path):
    path = make_tiny_model(tmp_path)
    for file in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        (path / file).unlink()
    one, same, other = (load_model(path, "float32", "cpu", load="random", seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint == random_fingerprint(path, 0)
    assert other.fingerprint != one.fingerprint
    embeddings = [loaded.model._weights.embedding for loaded in (one, same, other)]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])


def test_no_such_way_to_load(tmp_path):
    with pytest.raises(FixTheSetup, match="no way to load 'dummy': give auto or random"):
        load_model(make_tiny_model(tmp_path), "float32", "cpu", load="dummy")


@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [
        ("int8", "cpu", "no dtype 'int8': give auto, float32"),
        ("float32", "gpu", "no device 'gpu': give cpu"),
    ],
)
def test_no_such_dtype_or_device(tmp_path, dtype, device, message):
    with pytest.raises(FixTheSetup, match=message):
        load_model(make_tiny_model(tmp_path), dtype, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    with pytest.raises(FixTheSetup, match="torch sees none: give cpu"):
        load_model(make_tiny_model(tmp_path), "float32", "cuda")


def test_no_directory(tmp_path):
    with pytest.raises(ModelUnusable, match=r"config.json is missing: a model directory holds"):
        load_model(tmp_path / "none", "float32", "cpu")

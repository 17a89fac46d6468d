"""Weights on the GPU: what files hold arrives whole through pinned memory, and random numbers are those of a CPU."""

import pytest
import torch
from safetensors.torch import save_file

from engine import pinned_staging
from engine.loader import load_model
from engine.model_config import ModelConfig
from engine.random_source import RandomSource
from engine.safetensors_source import SafetensorsSource
from engine.weights import stored_shapes
from tiny_model import make_tiny_model

pytestmark = pytest.mark.gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored_as", [torch.bfloat16, torch.float32])
def test_files(tmp_path, monkeypatch, dtype, stored_as):
    monkeypatch.setattr(pinned_staging, "_BYTES", 40_000)  # many pieces, the last one short
    stored = {"a": torch.randn(301, 77).to(stored_as), "b": torch.randn(55, 77).to(stored_as), "c": torch.randn(9)}
    save_file(stored, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path, {name: tuple(part.shape) for name, part in stored.items()}, CUDA, print)
    for names in (["a", "b"], ["a"], ["c"], ["b", "a", "b"]):
        read = source.read(names, dtype)
        assert read.is_cuda
        wanted = torch.cat([stored[name] for name in names]).to(dtype)
        torch.testing.assert_close(read.cpu(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_random_numbers_are_those_of_a_cpu(dtype):
    shapes = {"x.weight": (5000, 4096), "odd.weight": (13, 7), "norm.weight": (64,)}  # more than one piece
    for name in shapes:
        one, two = (RandomSource(shapes, device, seed=3).read([name], dtype).cpu() for device in (CPU, CUDA))
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_random_model_takes_the_memory_of_its_weights(tmp_path):
    path = make_tiny_model(tmp_path, hidden=1024, ffn=4096, heads=8, layers=8, max_positions=256)
    parameters = sum(torch.Size(shape).numel() for shape in stored_shapes(ModelConfig.from_dir(path)).values())
    before = torch.cuda.memory_allocated()
    loaded = load_model(path, "bfloat16", "cuda", load="random")
    held = torch.cuda.memory_allocated() - before
    assert 2 * parameters < held < 2.05 * parameters
    assert loaded.fingerprint == load_model(path, "float32", "cpu", load="random").fingerprint

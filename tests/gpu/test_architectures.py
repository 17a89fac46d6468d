"""Every family in bfloat16 on the GPU: as near to float32 as transformers in bfloat16 is, on the same weights."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

import oracle
from engine.loader import load_model
from engine.model_config import ModelConfig
from engine.random_source import RandomSource
from engine.weights import stored_shapes
from paged_sequences import Pages
from tiny_model import make_tiny_model

pytestmark = pytest.mark.gpu

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
WINDOW = {"sliding_window": 70, "use_sliding_window": True, "max_window_layers": 2}
SIZES = {"hidden": 512, "heads": 8, "kv_heads": 2, "layers": 4, "ffn": 1024}


def make(path, **options):
    """A model of random weights whose logits are spread by 1, in bfloat16, so that only computing rounds."""
    shapes = stored_shapes(ModelConfig.from_dir(make_tiny_model(path, **(SIZES | options))))
    source = RandomSource(shapes, torch.device("cpu"), seed=0)
    weights = {name: source.read([name], torch.bfloat16) for name in shapes}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def rms(difference):
    return difference.float().square().mean().sqrt().item()


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "llama"},
        {"architecture": "llama", "head_dim": 128, "tied": True},
        {"architecture": "llama", "heads": 9, "kv_heads": 3, "hidden": 576},
        {"architecture": "llama", "rope_scaling": YARN},
        {"architecture": "mistral", "sliding_window": 70},
        {"architecture": "mistral", "sliding_window": 70, "head_dim": 128, "kv_heads": 8},
        {"architecture": "qwen2", "heads": 7, "kv_heads": 1, "hidden": 896},
        {"architecture": "qwen2", **WINDOW},
        {"architecture": "qwen3", "head_dim": 128},
        {"architecture": "qwen3", **WINDOW, "rope_parameters": YARN | {"rope_theta": 1e6}},
    ],
    ids=json.dumps,
)
def test_logits(tmp_path, options):
    path = make(tmp_path, **options)
    rng = random.Random(1)
    sequences = [[rng.randrange(300) for _ in range(length)] for length in (200, 90, 1)]
    exact = [oracle.logits(path, ids) for ids in sequences]
    theirs = oracle.load(path, torch.bfloat16).cuda()
    with torch.inference_mode():
        theirs = [theirs(torch.tensor([ids], device="cuda")).logits[0].cpu() for ids in sequences]
    bound = 1.3 * rms(torch.cat(theirs) - torch.cat(exact))
    model = load_model(path, "bfloat16", "cuda").model
    for page_size, chunks in ((64, [200]), (16, [1, 20, 64])):
        ours = [part.cpu() for part in Pages(model, page_size, device="cuda").run(sequences, chunks)]
        for one, wanted in zip(ours, exact, strict=True):
            assert one.isfinite().all()
            assert rms(one - wanted) < 2 * bound  # a short sequence strays more
        error = rms(torch.cat(ours) - torch.cat(exact))
        print(f"{json.dumps(options)} {chunks}: {error:.5f} of rms {rms(torch.cat(exact)):.3f}, bound {bound:.5f}")
        assert error < bound

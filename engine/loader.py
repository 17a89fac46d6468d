"""A model directory -> a decoder that is ready to run."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.fingerprint import model_fingerprint
from engine.model import Decoder
from engine.model_config import ModelConfig
from engine.weights import load_weights
from kernels.linear import has_float16_tiles
from protos.errors import FixTheSetup

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its configuration and the hash that tells its weights from others."""

    model: Decoder
    config: ModelConfig
    fingerprint: str


def load_model(path: str | os.PathLike[str], dtype: str, device: str) -> LoadedModel:
    """Load a Hugging Face directory. `dtype` is auto, float32, bfloat16 or float16.

    Raises `ModelUnusable` for missing or broken files, `FixTheSetup` for a dtype or device that there is not.
    """
    directory = Path(path)
    place = _device(device)
    config = ModelConfig.from_dir(directory)
    weights = load_weights(directory, config, _resolve_dtype(dtype, place), place)
    return LoadedModel(Decoder(config, weights), config, model_fingerprint(directory))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FixTheSetup(f"no device {name!r}: give cpu, cuda or cuda:0", stage="load") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FixTheSetup(f"device {name!r} asks for a GPU, and torch sees none: give cpu", stage="load")
    return device


def _resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        # Half the bytes to read for each token, where the product need not be emulated. SmolLM2-135M on two AVX2 cores:
        # one stream is level, 8 streams get 90 tokens/s against 59 in float32 (benchmarks/results/laptop_*.json), and
        # perplexity on 290 tokens of prose is 7.755 against 7.753.
        return torch.bfloat16 if device.type == "cuda" or has_float16_tiles() else torch.float32
    if name not in _DTYPES:
        raise FixTheSetup(f"no dtype {name!r}: give auto, {', '.join(_DTYPES)}", stage="load")
    return _DTYPES[name]

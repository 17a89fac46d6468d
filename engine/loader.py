"""A model directory -> a decoder that is ready to run."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.fingerprint import model_fingerprint, random_fingerprint
from engine.model import Decoder
from engine.model_config import ModelConfig
from engine.random_source import RandomSource
from engine.safetensors_source import SafetensorsSource
from engine.tensor_source import TensorSource
from engine.weights import assemble, stored_shapes
from kernels.linear import has_float16_tiles
from protos.errors import FixTheSetup

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its configuration and the hash that tells its weights from others."""

    model: Decoder
    config: ModelConfig
    fingerprint: str


def load_model(
    path: str | os.PathLike[str],
    dtype: str,
    device: str,
    *,
    load: str = "auto",
    seed: int = 0,
    progress: Callable[[str], None] = log.info,
) -> LoadedModel:
    """Load a Hugging Face directory. `dtype` is auto, float32, bfloat16 or float16.

    `load` is auto (the directory's weights) or random: config.json is all that is read, and `seed` tells one random
    model from another. `progress` gets a line now and then. Raises `ModelUnusable` for missing or broken files,
    `FixTheSetup` for a dtype, a device or a way to load that there is not.
    """
    directory, place = Path(path), _device(device)
    config = ModelConfig.from_dir(directory)
    shapes = stored_shapes(config)
    if load == "random":
        source: TensorSource = RandomSource(shapes, place, seed)
        fingerprint = random_fingerprint(directory, seed)
    elif load == "auto":
        source = SafetensorsSource(directory, shapes, place, progress)
        fingerprint = model_fingerprint(directory)
    else:
        raise FixTheSetup(f"no way to load {load!r}: give auto or random", stage="load")
    weights = assemble(config, source, _resolve_dtype(dtype, place))
    return LoadedModel(Decoder(config, weights), config, fingerprint)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FixTheSetup(f"no device {name!r}: give cpu, cuda or auto", stage="load") from error
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

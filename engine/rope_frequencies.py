"""The angles by which a model's rotary embedding turns q and k for each position."""

import math

import torch
from torch import Tensor

from engine.model_config import Llama3Scaling, ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """[head_dim / 2] float32, radians per position.

    In float32 throughout, as transformers computes them: at position 8,000 the last bit turns an angle by 0.0005.
    """
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else _stretched(frequencies, config.rope_scaling)


def _stretched(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended."""
    turns = scaling.original_positions / (2 * math.pi / frequencies)  # within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies

"""The angles by which a model's rotary embedding turns q and k for each position."""

import math

import torch
from torch import Tensor

from engine.model_config import ModelConfig
from engine.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """[head_dim / 2] float32, radians per position.

    In float32 throughout, as transformers computes them: at position 8,000 the last bit turns an angle by 0.0005.
    """
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    waves = config.rope_theta**exponents
    scaling = config.rope_scaling
    if isinstance(scaling, YarnScaling):
        return _yarn(waves, config, scaling)
    frequencies = 1.0 / waves
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequencies, scaling)
    return frequencies


def attention_factor(config: ModelConfig) -> float:
    """How much longer rotated queries and keys become: cos and sin are multiplied by it."""
    return config.rope_scaling.attention_factor if isinstance(config.rope_scaling, YarnScaling) else 1.0


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended."""
    turns = scaling.original_positions / (2 * math.pi / frequencies)  # within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def _yarn(waves: Tensor, config: ModelConfig, scaling: YarnScaling) -> Tensor:
    """Section 3.2 of the paper: the blend is a ramp over dimensions, from `beta_fast` turns down to `beta_slow`."""

    def dimension_of(turns: float) -> float:
        """Which dimension turns so often within the original context."""
        wave = scaling.original_positions / (turns * 2 * math.pi)
        return config.head_dim * math.log(wave) / (2 * math.log(config.rope_theta))

    first, last = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    ramp = (torch.arange(config.head_dim // 2).float() - first) / (last - first or 0.001)
    keep = 1 - ramp.clamp(0.0, 1.0)
    return 1.0 / (scaling.factor * waves) * (1 - keep) + 1.0 / waves * keep

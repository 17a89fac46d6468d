"""How a model stretches its rotary embedding over longer contexts, as config.json says it. No torch."""

import math
from dataclasses import dataclass
from typing import Any

from engine.json_fields import count, flag, positive


@dataclass(frozen=True)
class LinearScaling:
    """Every position counts as position / factor (`rope_type: linear`)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023; `rope_type: yarn`). Queries and keys are also made longer by `attention_factor`."""

    factor: float
    original_positions: int
    beta_fast: float  # dimensions that turn more often than this within the original context are kept
    beta_slow: float  # those that turn less often are slowed by `factor`
    attention_factor: float
    truncate: bool  # whether the ramp between the two begins and ends at whole dimensions


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def rope_settings(raw: dict[str, Any]) -> dict[str, Any]:
    """`rope_scaling` (before transformers 5) or `rope_parameters`, in the order in which transformers looks."""
    settings = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"rope_parameters is {settings!r}, not an object")
    return settings


def read_scaling(settings: dict[str, Any], max_positions: int) -> tuple[RopeScaling | None, int]:
    """(the scaling, the longest context with it), of `rope_settings` and the file's `max_position_embeddings`.

    Raises KeyError for a missing field, ValueError for one that cannot be used or a kind that is not built.
    """
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return None, max_positions
    if kind == "linear":
        factor = positive(settings, "factor")
        return LinearScaling(factor), int(factor * max_positions)
    if kind == "llama3":
        return _llama3(settings, max_positions), max_positions
    if kind == "yarn":
        yarn = _yarn(settings, max_positions)
        # Files of before and after the stretch are about: Qwen2.5's cards add it and leave max_position_embeddings.
        return yarn, max(max_positions, int(yarn.factor * yarn.original_positions))
    if kind == "dynamic":
        raise ValueError("rope_type 'dynamic' turns keys by the length that a sequence has yet to reach: not built")
    raise ValueError(f"rope_type {kind!r} is not built: default, linear, llama3 and yarn are")


def _llama3(settings: dict[str, Any], max_positions: int) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=positive(settings, "factor"),
        low_freq_factor=positive(settings, "low_freq_factor"),
        high_freq_factor=positive(settings, "high_freq_factor"),
        original_positions=count(settings, "original_max_position_embeddings", max_positions),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError("low_freq_factor must be below high_freq_factor")
    return scaling


def _yarn(settings: dict[str, Any], max_positions: int) -> YarnScaling:
    factor = positive(settings, "factor")
    return YarnScaling(
        factor=factor,
        original_positions=count(settings, "original_max_position_embeddings", max_positions),
        beta_fast=positive(settings, "beta_fast", 32.0),
        beta_slow=positive(settings, "beta_slow", 1.0),
        attention_factor=positive(settings, "attention_factor", _yarn_attention_factor(settings, factor)),
        truncate=flag(settings, "truncate", True),
    )


def _yarn_attention_factor(settings: dict[str, Any], factor: float) -> float:
    """The paper's 0.1 ln(factor) + 1; where the file gives both weights of the logarithm (DeepSeek), their ratio."""

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return grown(positive(settings, "mscale")) / grown(positive(settings, "mscale_all_dim"))
    return grown(1.0)

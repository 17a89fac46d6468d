"""A model's sizes, read from a Hugging Face directory. No torch: the router reads them too."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos.errors import ModelUnusable

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. Sizes are counts of elements; `ffn` is the width of gate and of up."""

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tie_embeddings: bool
    qkv_bias: bool  # Qwen2
    qk_norm: bool  # Qwen3: RMS norm of each head's q and k before the rotation
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dir(cls, path: Path) -> "ModelConfig":
        """Read config.json and generation_config.json. Raises `ModelUnusable`."""
        raw = read_json(path / "config.json")
        try:
            return _parse(raw, path)
        except (KeyError, TypeError, ValueError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise ModelUnusable(
                f"{path / 'config.json'} cannot be used ({what}): fetch the model's files again", stage="load"
            ) from error

    @property
    def rope_identity(self) -> str:
        """Equal for two models exactly when their keys are rotated alike."""
        return f"{self.head_dim} {self.rope_theta!r} {self.rope_scaling}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's directory. Raises `ModelUnusable`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelUnusable(
            f"{path} is missing: a model directory holds config.json, tokenizer.json and *.safetensors", stage="load"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{path} cannot be read ({error}): fetch the model's files again", stage="load") from error
    if not isinstance(value, dict):
        raise ModelUnusable(f"{path} holds no JSON object: fetch the model's files again", stage="load")
    return value


def eos_token_ids(path: Path) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's, else config.json's; as transformers' `generate`."""
    for name in ("generation_config.json", "config.json"):
        file = path / name
        value = read_json(file).get("eos_token_id") if name == "config.json" or file.exists() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
                raise ModelUnusable(
                    f"{file}: eos_token_id is {value!r}, not ids: fetch the model's files again", stage="load"
                )
            return tuple(ids)
    return ()


def _parse(raw: dict[str, Any], path: Path) -> ModelConfig:
    architecture = raw.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ModelUnusable(
            f"{path} is of architecture {architecture!r}, which is not built: choose a model of one of "
            f"{', '.join(ARCHITECTURES)}",
            stage="load",
        )
    _refuse_variants(raw, path)
    heads = _count(raw, "num_attention_heads")
    hidden = _count(raw, "hidden_size")
    config = ModelConfig(
        architecture=architecture,
        hidden=hidden,
        layers=_count(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=_count(raw, "num_key_value_heads", heads),
        head_dim=_count(raw, "head_dim", hidden // heads),
        ffn=_count(raw, "intermediate_size"),
        vocab=_count(raw, "vocab_size"),
        max_positions=_positions(raw),
        rms_eps=_positive(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        rope_theta=_positive(_rope(raw).get("rope_theta", raw.get("rope_theta", 10000.0)), "rope_theta"),
        rope_scaling=_scaling(_rope(raw), path),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=eos_token_ids(path),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise ValueError(f"{config.heads} heads of {config.head_dim} do not fit {config.kv_heads} kv heads")
    return config


def _refuse_variants(raw: dict[str, Any], path: Path) -> None:
    """Settings that would change what is computed and are not built."""
    variants = {
        "hidden_act": raw.get("hidden_act", "silu") == "silu",
        "attention_bias": not raw.get("attention_bias") or raw["model_type"] == "qwen2",
        "mlp_bias": not raw.get("mlp_bias"),
        "quantization_config": raw.get("quantization_config") is None,
    }
    for name, supported in variants.items():
        if not supported:
            raise ModelUnusable(
                f"{path}: {name} = {raw[name]!r} is not built: choose a variant of the model without it", stage="load"
            )


def _count(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None and default is not None:
        value = default
    if value is None:
        raise KeyError(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, not a whole number above 0")
    return value


def _positive(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, not a number above 0")
    return float(value)


def _positions(raw: dict[str, Any]) -> int:
    """The longest sequence. Inside a sliding window plain causal attention is the same, so the window ends it."""
    positions = _count(raw, "max_position_embeddings")
    window = raw.get("sliding_window")
    if window is None or not raw.get("use_sliding_window", raw["model_type"] == "mistral"):
        return positions
    return min(positions, _count(raw, "sliding_window"))


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _scaling(rope: dict[str, Any], path: Path) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelUnusable(
            f"{path}: rope scaling {kind!r} is not built (default and llama3 are): choose another model", stage="load"
        )
    return Llama3Scaling(
        factor=_positive(rope["factor"], "factor"),
        low_freq_factor=_positive(rope["low_freq_factor"], "low_freq_factor"),
        high_freq_factor=_positive(rope["high_freq_factor"], "high_freq_factor"),
        original_positions=_count(rope, "original_max_position_embeddings"),
    )

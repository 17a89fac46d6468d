"""A model's sizes, read from a Hugging Face directory. No torch: the router reads them too."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.json_fields import count, flag, positive, read_json
from engine.rope_scaling import RopeScaling, read_scaling, rope_settings
from protos.errors import ModelUnusable


@dataclass(frozen=True)
class Architecture:
    """What sets one member of the Llama family apart.

    `defaults` are what transformers takes for fields that config.json leaves out. A sliding window needs three:
    `sliding_window`, whether it is used, and the first layer that uses it where `layer_types` does not say.
    """

    qkv_bias: bool = False  # biases on q, k and v, none on the output
    qk_norm: bool = False  # RMS norm of each head's q and k before the rotation
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

# By config.json's `model_type`. Add an architecture here, and to tests/test_engine_architectures.py.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Architecture(qkv_bias=True, defaults=_QWEN),
    "qwen3": Architecture(qk_norm=True, defaults=_QWEN | {"head_dim": 128}),
}


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
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # of each layer: a query sees so many of the newest keys, its own included; 0: all
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
                f"{path / 'config.json'} cannot be used ({what}): fetch the model's files again, or choose another",
                stage="load",
            ) from error

    @property
    def rope_identity(self) -> str:
        """Equal for two models exactly when their keys are rotated alike."""
        return f"{self.head_dim} {self.rope_theta!r} {self.rope_scaling}"


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
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelUnusable(
            f"{path} is of architecture {name!r}, which is not built: choose a model of one of "
            f"{', '.join(ARCHITECTURES)}",
            stage="load",
        )
    architecture = ARCHITECTURES[name]
    raw = {**architecture.defaults, **raw}
    rope = rope_settings(raw)
    _refuse_variants(raw, rope, path)
    heads, hidden, layers = (count(raw, key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    scaling, max_positions = read_scaling(rope, count(raw, "max_position_embeddings"))
    config = ModelConfig(
        architecture=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=count(raw, "num_key_value_heads", heads),
        head_dim=count(raw, "head_dim", hidden // heads),
        ffn=count(raw, "intermediate_size"),
        vocab=count(raw, "vocab_size"),
        max_positions=max_positions,
        rms_eps=positive(raw, "rms_norm_eps", 1e-6),
        rope_theta=positive(raw | rope, "rope_theta", 10000.0),
        rope_scaling=scaling,
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        windows=tuple(window if window < max_positions else 0 for window in _windows(raw, layers)),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=eos_token_ids(path),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise ValueError(f"{config.heads} heads of {config.head_dim} do not fit {config.kv_heads} kv heads")
    return config


def _refuse_variants(raw: dict[str, Any], rope: dict[str, Any], path: Path) -> None:
    """Settings that would change what is computed and are not built."""
    kind = raw["model_type"]
    variants = {
        "hidden_act": raw.get("hidden_act", "silu") == "silu",
        "attention_bias": not raw.get("attention_bias") or kind == "qwen2",  # there it says nothing
        "mlp_bias": not raw.get("mlp_bias"),
        "quantization_config": raw.get("quantization_config") is None,
        "sliding_window": raw.get("sliding_window") is None or kind != "llama",
        "dual_chunk_attention_config": raw.get("dual_chunk_attention_config") is None,  # Qwen2.5-1M
        "partial_rotary_factor": (raw | rope).get("partial_rotary_factor") in (None, 1),
        "rope_interleaved": not raw.get("rope_interleaved"),
        "use_mrope": not raw.get("use_mrope"),
        "mrope_section": rope.get("mrope_section") is None,  # Qwen2-VL
        "rope_parameters": not any(isinstance(value, dict) for value in rope.values()),  # one for each kind of layer
    }
    for name, supported in variants.items():
        if not supported:
            raise ModelUnusable(
                f"{path}: {name} = {(raw | rope).get(name)!r} is not built: choose a variant of the model without it",
                stage="load",
            )


def _windows(raw: dict[str, Any], layers: int) -> list[int]:
    """Each layer's window, 0 for none; as transformers reads `sliding_window`, its flags and `layer_types`."""
    used = flag(raw, "use_sliding_window", True) and raw.get("sliding_window") is not None
    window = count(raw, "sliding_window") if used else 0
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers") or 0
        kinds = ["full_attention" if index < first else "sliding_attention" for index in range(layers)]
        kinds = kinds if window else ["full_attention"] * layers
    if len(kinds) != layers:
        raise ValueError(f"layer_types names {len(kinds)} layers of {layers}")
    sizes = {"full_attention": 0, "sliding_attention": window}
    for kind in kinds:
        if kind not in sizes:
            raise ValueError(f"layer_types names {kind!r}, which is not built: {' and '.join(sizes)} are")
        if kind == "sliding_attention" and not window:
            raise ValueError("layer_types asks for a window that sliding_window and use_sliding_window do not give")
    return [sizes[kind] for kind in kinds]

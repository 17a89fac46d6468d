"""A decoder's weights, read from safetensors files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.fingerprint import weight_files
from engine.model_config import ModelConfig
from kernels.linear import Weight, prepare_weight
from protos.errors import ModelUnusable


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in], laid out by `prepare_weight`; norms and biases have the activations'
    dtype.
    """

    input_norm: Tensor  # [hidden]
    qkv: Weight  # [(heads + 2 * kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    output: Weight  # [hidden, heads * head_dim]
    ffn_norm: Tensor  # [hidden]
    gate_up: Weight  # [2 * ffn, hidden], gate first
    down: Weight  # [hidden, ffn]


@dataclass(frozen=True)
class Weights:
    """All of a decoder."""

    embedding: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    final_norm: Tensor  # [hidden]
    lm_head: Weight  # [vocab, hidden]


def load_weights(path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Read the weights of a model directory. Raises `ModelUnusable` that names what is missing or of a wrong shape.

    On a CPU, what has `dtype` in the file and needs no other layout stays in the mapped file (the embedding, for one):
    processes share it.
    """
    return _Reader(path, config, dtype, device).read()


class _Reader:
    def __init__(self, path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._path = path
        self._config = config
        self._dtype = dtype
        self._device = device
        # A CPU computes in float32 whatever the weights are: between its kernels half-width numbers would only be
        # rounded and widened again, which took a tenth of a decode step.
        self._activations = torch.float32 if device.type == "cpu" else dtype
        self._files: dict[str, Any] = {}  # tensor's name to its opened file
        for file in weight_files(path):
            try:
                opened: Any = safe_open(file, framework="pt")  # its stub has no types
            except (SafetensorError, OSError) as error:
                raise ModelUnusable(
                    f"{file} is broken or cut short ({error}): fetch the model's files again", stage="load"
                ) from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def read(self) -> Weights:
        config = self._config
        embedding = self._tensor((config.vocab, config.hidden), "model.embed_tokens.weight", dtype=self._dtype)
        return Weights(
            embedding=embedding,
            layers=[self._layer(f"model.layers.{index}.") for index in range(config.layers)],
            final_norm=self._vector(config.hidden, "model.norm.weight"),
            lm_head=prepare_weight(embedding)
            if config.tie_embeddings
            else self._matrix((config.vocab, config.hidden), "lm_head.weight"),
        )

    def _layer(self, prefix: str) -> LayerWeights:
        config = self._config
        hidden, q_rows, kv_rows = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
        qkv = [f"{prefix}self_attn.{part}_proj" for part in "qkv"]
        gate_up = [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up")]
        qkv_rows = q_rows + 2 * kv_rows

        def head_norm(part: str) -> Tensor | None:
            return self._vector(config.head_dim, f"{prefix}self_attn.{part}_norm.weight") if config.qk_norm else None

        return LayerWeights(
            input_norm=self._vector(hidden, f"{prefix}input_layernorm.weight"),
            qkv=self._matrix((qkv_rows, hidden), *(f"{name}.weight" for name in qkv)),
            qkv_bias=self._vector(qkv_rows, *(f"{name}.bias" for name in qkv)) if config.qkv_bias else None,
            q_norm=head_norm("q"),
            k_norm=head_norm("k"),
            output=self._matrix((hidden, q_rows), f"{prefix}self_attn.o_proj.weight"),
            ffn_norm=self._vector(hidden, f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._matrix((2 * config.ffn, hidden), *gate_up),
            down=self._matrix((hidden, config.ffn), f"{prefix}mlp.down_proj.weight"),
        )

    def _matrix(self, shape: tuple[int, ...], *names: str) -> Weight:
        return prepare_weight(self._tensor(shape, *names, dtype=self._dtype))

    def _vector(self, size: int, *names: str) -> Tensor:
        return self._tensor((size,), *names, dtype=self._activations)

    def _tensor(self, shape: tuple[int, ...], *names: str, dtype: torch.dtype) -> Tensor:
        """The named tensors, one below the other."""
        parts = [self._stored(name) for name in names]
        rows = sum(part.shape[0] for part in parts)
        if any(part.shape[1:] != shape[1:] for part in parts) or rows != shape[0]:
            found = ", ".join(str(list(part.shape)) for part in parts)
            raise ModelUnusable(
                f"{self._path}: {' + '.join(names)} is {found}, but config.json asks for {list(shape)}: fetch the "
                "model's files again",
                stage="load",
            )
        placed = [part.to(self._device, dtype) for part in parts]
        return placed[0] if len(placed) == 1 else torch.cat(placed)

    def _stored(self, name: str) -> Tensor:
        if name not in self._files:
            raise ModelUnusable(f"{self._path} has no weight {name!r}: fetch the model's files again", stage="load")
        tensor: Tensor = self._files[name].get_tensor(name)
        if not tensor.is_floating_point():
            raise ModelUnusable(
                f"{self._path}: {name} is stored as {tensor.dtype}, a quantisation that is not built: choose the "
                "model in float32, bfloat16 or float16",
                stage="load",
            )
        return tensor

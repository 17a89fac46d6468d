"""A decoder's weights: which tensors a model directory holds, and how they are put together for computing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model_config import ModelConfig
from engine.tensor_source import TensorSource
from kernels.linear import Weight, prepare_weight


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


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a model of this configuration has, by its Hugging Face name."""
    hidden, q_rows, kv_rows = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab, hidden)
    for index in range(config.layers):
        layer = f"model.layers.{index}."
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        if config.qk_norm:
            shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, q_rows)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (config.ffn, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, config.ffn)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def assemble(config: ModelConfig, source: TensorSource, dtype: torch.dtype) -> Weights:
    """Read all weights, tensor by tensor: besides what is kept, one tensor's parts are in memory at a time."""
    return _Assembly(config, source, dtype).weights()


class _Assembly:
    def __init__(self, config: ModelConfig, source: TensorSource, dtype: torch.dtype) -> None:
        self._config = config
        self._source = source
        self._dtype = dtype
        # A CPU computes in float32 whatever the weights are: between its kernels half-width numbers would only be
        # rounded and widened again, which took a tenth of a decode step.
        self._activations = torch.float32 if source.device.type == "cpu" else dtype

    def weights(self) -> Weights:
        embedding = self._source.read(["model.embed_tokens.weight"], self._dtype)
        return Weights(
            embedding=embedding,
            layers=[self._layer(f"model.layers.{index}.") for index in range(self._config.layers)],
            final_norm=self._vector("model.norm.weight"),
            lm_head=prepare_weight(embedding) if self._config.tie_embeddings else self._matrix("lm_head.weight"),
        )

    def _layer(self, layer: str) -> LayerWeights:
        qkv = [f"{layer}self_attn.{part}_proj" for part in "qkv"]
        bias, norm = self._config.qkv_bias, self._config.qk_norm
        return LayerWeights(
            input_norm=self._vector(f"{layer}input_layernorm.weight"),
            qkv=self._matrix(*(f"{name}.weight" for name in qkv)),
            qkv_bias=self._vector(*(f"{name}.bias" for name in qkv)) if bias else None,
            q_norm=self._vector(f"{layer}self_attn.q_norm.weight") if norm else None,
            k_norm=self._vector(f"{layer}self_attn.k_norm.weight") if norm else None,
            output=self._matrix(f"{layer}self_attn.o_proj.weight"),
            ffn_norm=self._vector(f"{layer}post_attention_layernorm.weight"),
            gate_up=self._matrix(f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"),
            down=self._matrix(f"{layer}mlp.down_proj.weight"),
        )

    def _matrix(self, *names: str) -> Weight:
        return prepare_weight(self._source.read(list(names), self._dtype))

    def _vector(self, *names: str) -> Tensor:
        return self._source.read(list(names), self._activations)

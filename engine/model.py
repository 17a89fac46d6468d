"""The decoder of the Llama family (Touvron et al. 2023), over paged KV."""

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.model_config import ModelConfig
from engine.rope_frequencies import inverse_frequencies
from engine.weights import LayerWeights, Weights
from kernels.attention import paged_attention
from kernels.linear import linear
from kernels.page_write import page_write
from kernels.rms_norm import rms_norm, rms_norm_residual
from kernels.rope import rope, rope_tables
from kernels.silu_mul import silu_mul


class Decoder:
    """Weights and what is computed with them. Holds no state of any sequence: that is all in the cache."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self._weights = weights
        device = weights.embedding.device
        tables = rope_tables(inverse_frequencies(config), config.max_positions)
        self._cos, self._sin = (table.to(device) for table in tables)  # [max_positions, head_dim]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._weights.embedding.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of K and V: that of the activations, which on a CPU is float32, whatever the weights are.

        A CPU multiplies in float32 anyway, and widening half-width pages for each step costs more than their bytes
        save: 32 sequences of 300 tokens took 289 ms a step with bfloat16 pages, 182 with float32.
        """
        return self._weights.final_norm.dtype

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Write the batch's K and V into `cache` and return the logits of `batch.logit_rows`: [rows, vocab] float32.

        cache: [pages, layers, 2, kv_heads, page_size, head_dim] of `cache_dtype`. It must already hold the K and V of
        all earlier positions of the batch's sequences.
        """
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]  # [tokens, head_dim]
        residual = self._weights.embedding[batch.token_ids].to(self._weights.final_norm.dtype)  # [tokens, hidden]
        update: Tensor | None = None
        for index, layer in enumerate(self._weights.layers):
            normed, residual = self._norm(update, residual, layer.input_norm)
            attended = self._attention(normed, index, layer, cos, sin, batch, cache)
            if index == self.config.layers - 1:  # nothing below needs the other tokens
                attended, residual = attended[batch.logit_rows], residual[batch.logit_rows]
            update = linear(attended, layer.output)
            normed, residual = self._norm(update, residual, layer.ffn_norm)
            update = linear(silu_mul(linear(normed, layer.gate_up)), layer.down)
        normed, _ = self._norm(update, residual, self._weights.final_norm)
        return linear(normed, self._weights.lm_head).float()

    def _norm(self, update: Tensor | None, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(the normed residual stream, the residual stream), after `update` is added to it."""
        if update is None:
            return rms_norm(residual, weight, self.config.rms_eps), residual
        return rms_norm_residual(update, residual, weight, self.config.rms_eps)

    def _attention(
        self, x: Tensor, index: int, layer: LayerWeights, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: Tensor
    ) -> Tensor:
        """x [tokens, hidden] -> what the heads read from the context [tokens, heads * head_dim]."""
        heads, kv_heads, head_dim = self.config.heads, self.config.kv_heads, self.config.head_dim
        qkv = linear(x, layer.qkv, layer.qkv_bias).view(-1, heads + 2 * kv_heads, head_dim)
        q, k, v = qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, self.config.rms_eps)
            k = rms_norm(k, layer.k_norm, self.config.rms_eps)
        q, k = rope(q, k, cos, sin)
        page_write(k, v, cache, index, batch.slots)
        return paged_attention(q, cache, index, batch.plan).flatten(1)

"""The decoder of the Llama family (Touvron et al. 2023), over paged KV."""

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.model_config import ModelConfig
from engine.rope_frequencies import attention_factor, inverse_frequencies
from engine.weights import LayerWeights, Weights
from kernels.attention import DecodePlan, paged_attention
from kernels.embedding import embedding
from kernels.linear import linear
from kernels.qkv_to_pages import qkv_to_pages
from kernels.rms_norm import rms_norm, rms_norm_residual
from kernels.rope import rope_tables
from kernels.silu_mul import silu_mul


class Decoder:
    """Weights and what is computed with them. Holds no state of any sequence: that is all in the cache."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self._weights = weights
        device = weights.embedding.device
        tables = rope_tables(inverse_frequencies(config), config.max_positions)
        factor = attention_factor(config)
        self._cos, self._sin = (table.mul_(factor).to(device) for table in tables)  # [max_positions, head_dim]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self._weights.embedding.device

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

        The arguments are those of `hidden`.
        """
        return self.logits(self.hidden(batch, cache))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden], as `hidden` returns them -> [rows, vocab] float32."""
        return self.lm_head(hidden).float()

    @torch.inference_mode()
    def lm_head(self, hidden: Tensor) -> Tensor:
        """As `logits`, in the activations' dtype."""
        return linear(hidden, self._weights.lm_head)

    @torch.inference_mode()
    def hidden(self, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Write the batch's K and V into `cache` and return what the LM head reads at `batch.logit_rows`.

        Returns [rows, hidden] of the activations' dtype.
        cache: [pages, layers, 2, kv_heads, page_size, head_dim] of `cache_dtype`. It must already hold the K and V of
        all earlier positions of the batch's sequences.
        """
        # Short kernels are mostly start and end, so in a graph each starts while the one before it still runs.
        overlap = isinstance(batch.plan, DecodePlan)
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]  # [tokens, head_dim]
        residual = embedding(batch.token_ids, self._weights.embedding, self._weights.final_norm.dtype)
        update: Tensor | None = None
        for index, layer in enumerate(self._weights.layers):
            normed, residual = self._norm(update, residual, layer.input_norm, overlap)
            attended = self._attention(normed, index, layer, cos, sin, batch, cache, overlap)
            if index == self.config.layers - 1 and batch.logit_rows is not None:  # nothing below needs the others
                attended, residual = attended[batch.logit_rows], residual[batch.logit_rows]
            update = linear(attended, layer.output, overlap_previous=overlap)
            normed, residual = self._norm(update, residual, layer.ffn_norm, overlap)
            gated = silu_mul(linear(normed, layer.gate_up, overlap_previous=overlap), overlap_previous=overlap)
            update = linear(gated, layer.down, overlap_previous=overlap)
        normed, _ = self._norm(update, residual, self._weights.final_norm, overlap)
        return normed

    def _norm(self, update: Tensor | None, residual: Tensor, weight: Tensor, overlap: bool) -> tuple[Tensor, Tensor]:
        """(the normed residual stream, the residual stream), after `update` is added to it."""
        if update is None:
            return rms_norm(residual, weight, self.config.rms_eps, overlap_previous=overlap), residual
        return rms_norm_residual(update, residual, weight, self.config.rms_eps, overlap_previous=overlap)

    def _attention(
        self,
        x: Tensor,
        index: int,
        layer: LayerWeights,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        cache: Tensor,
        overlap: bool,
    ) -> Tensor:
        """x [tokens, hidden] -> what the heads read from the context [tokens, heads * head_dim]."""
        heads, kv_heads, head_dim = self.config.heads, self.config.kv_heads, self.config.head_dim
        qkv = linear(x, layer.qkv, layer.qkv_bias, overlap_previous=overlap).view(-1, heads + 2 * kv_heads, head_dim)
        eps = self.config.rms_eps
        q = qkv_to_pages(
            qkv, cos, sin, layer.q_norm, layer.k_norm, eps, cache, index, batch.slots, overlap_previous=overlap
        )
        return paged_attention(q, cache, index, batch.plan, window=self.config.windows[index]).flatten(1)

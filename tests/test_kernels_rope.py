"""Rotary embedding equals transformers', and is a rotation."""

import warnings

import pytest
import torch

from kernels.rope import rope, rope_tables

THETA = 10000.0


def inverse_frequencies(d: int) -> torch.Tensor:
    return THETA ** -(torch.arange(0, d, 2).double() / d)


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Complex multiplication in float64: halves are real and imaginary parts."""
    d = x.shape[-1]
    angle = positions.double()[:, None, None] * inverse_frequencies(d)
    z = torch.complex(x.double()[..., : d // 2], x.double()[..., d // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_rotates(d, dtype, tolerance):
    fused = torch.randn(5, 12 + 4 + 4, d).to(dtype)
    q, k = fused[:, :12], fused[:, 12:16]
    positions = torch.tensor([0, 1, 7, 400, 2047])
    cos, sin = rope_tables(inverse_frequencies(d), 2048)
    out_q, out_k = rope(q, k, cos[positions], sin[positions])
    assert out_q.dtype == out_k.dtype == dtype
    torch.testing.assert_close(out_q.double(), rotated(q, positions), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(out_k.double(), rotated(k, positions), atol=tolerance, rtol=tolerance)


def test_transformers_agrees():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations are not ours
        from transformers import LlamaConfig
        from transformers.models.llama import modeling_llama
    config = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=512)
    embedding = modeling_llama.LlamaRotaryEmbedding(config)
    positions = torch.tensor([0, 3, 100, 511])
    q, k = torch.randn(4, 9, 64), torch.randn(4, 3, 64)
    tables = embedding(q, positions[None])  # [1, tokens, d]
    heads_first = (q.transpose(0, 1)[None], k.transpose(0, 1)[None])
    expected_q, expected_k = modeling_llama.apply_rotary_pos_emb(*heads_first, *tables)
    cos, sin = rope_tables(embedding.inv_freq, 512)
    out_q, out_k = rope(q, k, cos[positions], sin[positions])
    torch.testing.assert_close(out_q, expected_q[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out_k, expected_k[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"k": torch.zeros(3, 1, 8)}, "k is"),
        ({"k": torch.zeros(2, 1, 4)}, "k is"),
        ({"k": torch.zeros(2, 1, 8).half()}, "k is"),
        ({"cos": torch.zeros(2, 4)}, "cos and sin"),
        ({"sin": torch.zeros(1, 8)}, "cos and sin"),
    ],
)
def test_wrong_arguments_are_named(changes, name):
    arguments = {"q": torch.zeros(2, 3, 8), "k": torch.zeros(2, 1, 8)}
    arguments |= {"cos": torch.zeros(2, 8), "sin": torch.zeros(2, 8)} | changes
    with pytest.raises(ValueError, match=name):
        rope(**arguments)

"""The loads under which engines are measured, and the least time that a GPU could take for each."""

import json
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parent / "configs" / "llama-3-8b.json"  # random weights, bfloat16
DECODE = ((512, 1), (512, 16), (512, 64), (512, 256), (4096, 1), (4096, 16), (4096, 64), (4096, 96))  # context, batch
PREFILL = (512, 1024, 2048, 4096, 8192)  # tokens of a prompt
SATURATED = 32768  # tokens of all prompts that are there at once
ALONE = 7  # prompts, one after the other
WARM, STEPS, WINDOWS = 8, 48, 3  # decode steps: before any is counted, in each window, and so many windows
_BYTES = 2  # of a number

Json = dict[str, Any]


def decode_floor_ms(batch: int, context: float, read_gb_per_s: float) -> float:
    """The weights, and K and V of `context` tokens of each sequence, read once."""
    m = _shape()
    kv = batch * context * m["num_hidden_layers"] * 2 * m["num_key_value_heads"] * m["head_dim"]
    return float((weights() + kv) * _BYTES / read_gb_per_s / 1e6)


def prefill_floor_tokens_per_s(length: int, tflops: float) -> float:
    """Every matrix product of a prompt at the rate of one large one; causal attention is half of the square."""
    m = _shape()
    attention = 2 * m["num_hidden_layers"] * m["num_attention_heads"] * m["head_dim"] * length  # of a token, on average
    head = m["vocab_size"] * m["hidden_size"]  # of the last token alone
    flops = 2 * (weights() - head) + attention + 2 * head / length
    return tflops * 1e12 / flops


def weights() -> int:
    """Numbers of all matrices but the embedding."""
    m = _shape()
    hidden, heads, kv_heads = m["hidden_size"], m["num_attention_heads"], m["num_key_value_heads"]
    layer = hidden * ((2 * heads + 2 * kv_heads) * m["head_dim"] + 3 * m["intermediate_size"])
    return int(m["num_hidden_layers"] * layer + m["vocab_size"] * hidden)


def _shape() -> Json:
    shape: Json = json.loads(MODEL.read_text())
    return shape

"""What the config.json of published models says, less what no decoder reads; and how many parameters each has."""

from typing import Any

_LLAMA_2 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 32000,
}
_LLAMA_31 = _LLAMA_2 | {
    "attention_bias": False,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "vocab_size": 128256,
}
_SMOLLM2 = _LLAMA_2 | {
    "attention_bias": False,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "vocab_size": 49152,
}
_MISTRAL = {
    "model_type": "mistral",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 32000,
}
_QWEN25 = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "vocab_size": 152064,
}
_QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vocab_size": 151936,
}

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (_LLAMA_2, 6_738_415_616),
    "Llama-3.1-8B": (_LLAMA_31, 8_030_261_248),
    "Llama-3.2-1B": (
        _LLAMA_31
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
        | {"tie_word_embeddings": True, "rope_scaling": _LLAMA_31["rope_scaling"] | {"factor": 32.0}},
        1_235_814_400,
    ),
    "SmolLM2-135M": (_SMOLLM2, 134_515_008),
    "Mistral-7B-v0.1": (_MISTRAL, 7_241_732_096),
    "Mistral-7B-v0.3": (
        _MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
        7_248_023_552,
    ),
    "Qwen2.5-0.5B": (
        _QWEN25
        | {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
        | {"num_hidden_layers": 24, "max_window_layers": 24, "tie_word_embeddings": True, "vocab_size": 151936}
        | {"max_position_embeddings": 32768, "sliding_window": 32768},
        494_032_768,
    ),
    "Qwen2.5-7B": (_QWEN25, 7_615_616_512),
    "Qwen3-0.6B": (
        _QWEN3
        | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28}
        | {"max_window_layers": 28, "tie_word_embeddings": True},
        596_049_920,
    ),
    "Qwen3-8B": (_QWEN3, 8_190_735_360),
}
# As Qwen's cards tell you to ask for longer contexts.
QWEN_YARN = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}

"""A random two-layer llama directory that loads in milliseconds: real files, real tokenizer, no download."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_ID = SPECIAL_TOKENS.index("<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_WORDS = " the| of| and| to| in| is| you| that| it| was| for| on| are| with| as| user|assistant|system|ing|er|ion"


def make_tiny_model(
    path: Path,
    *,
    seed: int = 0,
    architecture: str = "llama",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
    tied: bool = False,
    max_positions: int = 2048,
    shards: int = 1,
    **config: Any,
) -> Path:
    """Write the model under `path` and return it. The same arguments give the same bytes.

    `architecture` is llama, mistral, qwen2 (biases) or qwen3 (norms of q and k). `config` goes into config.json.
    The weights are large enough that greedy answers wander: a lost or repeated token changes what follows.
    """
    path.mkdir(parents=True, exist_ok=True)
    vocab = _write_tokenizer(path)
    settings = {
        "model_type": architecture,
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": EOS_ID,
        "torch_dtype": "float32",
    } | config
    _write_json(path / "config.json", settings)
    _write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": EOS_ID})
    _write_shards(path, _random_tensors(settings, np.random.default_rng(seed)), shards)
    return path


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _random_tensors(settings: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    hidden, ffn, head_dim = settings["hidden_size"], settings["intermediate_size"], settings["head_dim"]
    q_rows, kv_rows = settings["num_attention_heads"] * head_dim, settings["num_key_value_heads"] * head_dim

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return np.asarray(rng.standard_normal((rows, columns)) * (gain / columns**0.5), dtype=np.float32)

    def norm(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(settings["vocab_size"], hidden, 4.0)}
    for index in range(settings["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        for name, count in rows.items():
            tensors[f"{layer}self_attn.{name}.weight"] = matrix(count, hidden, 2.0)
            if settings["model_type"] == "qwen2":
                tensors[f"{layer}self_attn.{name}.bias"] = matrix(1, count)[0]
        if settings["model_type"] == "qwen3":
            tensors[f"{layer}self_attn.q_norm.weight"] = norm(head_dim)
            tensors[f"{layer}self_attn.k_norm.weight"] = norm(head_dim)
        tensors[f"{layer}self_attn.o_proj.weight"] = matrix(hidden, q_rows, 4.0)
        tensors[f"{layer}mlp.gate_proj.weight"] = matrix(ffn, hidden, 2.0)
        tensors[f"{layer}mlp.up_proj.weight"] = matrix(ffn, hidden, 2.0)
        tensors[f"{layer}mlp.down_proj.weight"] = matrix(hidden, ffn, 2.0)
        tensors[f"{layer}input_layernorm.weight"] = norm(hidden)
        tensors[f"{layer}post_attention_layernorm.weight"] = norm(hidden)
    tensors["model.norm.weight"] = norm(hidden)
    if not settings["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(settings["vocab_size"], hidden, 4.0)
    return tensors


def _write_shards(path: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        shard = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index::shards]  # neighbours land in different shards
        save_file({name: tensors[name] for name in part}, path / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tokenizer(path: Path) -> int:
    """Byte-level BPE: the special tokens, every byte, and a few words. Returns the number of ids."""
    vocab = {
        token: index for index, token in enumerate([*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    merges: list[tuple[str, str]] = []
    for word in _WORDS.replace(" ", "Ġ").split("|"):
        left = word[0]
        for right in word[1:]:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
            left += right
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(path / "tokenizer_config.json", settings)
    return tokenizer.get_vocab_size()


def make_sentencepiece_model(path: Path) -> Path:
    """A tiny model with a tokenizer of Llama 2's kind: a space mark, and bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "▁hi"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "h"), ("▁h", "i")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    make_tiny_model(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path

"""The tiny model as a GGUF file, written as llama.cpp's converter would."""

import json

import gguf
from safetensors.numpy import load_file

from tiny_model import CHAT_TEMPLATE, EOS_ID

_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_IN_LAYER[inner]}.{kind}"


def _permuted(weight, heads):
    """As llama.cpp's converter stores q and k of llama models."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def make_tiny_gguf(source, out, *, quantisation=None, pre="smollm", add=None, leave_out=(), **changes):
    """Write the model in `source` (one file of weights) as the GGUF file `out`, and return that.

    `add` are more tensors by their GGUF names, `leave_out` some of the model's by theirs. `changes` replace metadata;
    None leaves a field out.
    """
    config = json.loads((source / "config.json").read_text())
    arch = config["model_type"]
    fields = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    } | changes
    writer = gguf.GGUFWriter(out, fields.pop("arch", arch))
    for name, value in fields.items():
        if value is not None:
            add_field = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add_field(f"{arch}.{name}", value)
    _add_tokenizer(writer, json.loads((source / "tokenizer.json").read_text()), pre)
    for name, weight in load_file(source / "model.safetensors").items():
        if name not in leave_out:
            _add_weight(writer, name, weight, config, quantisation)
    for name, weight in (add or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add_tokenizer(writer, tokenizer, pre):
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(EOS_ID)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_weight(writer, name, weight, config, quantisation):
    if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        weight = _permuted(weight, config[f"num_{'attention' if 'q_proj' in name else 'key_value'}_heads"])
    if quantisation is not None and weight.ndim == 2:
        writer.add_tensor(_gguf_name(name), gguf.quantize(weight, quantisation), raw_dtype=quantisation)
    else:
        writer.add_tensor(_gguf_name(name), weight)

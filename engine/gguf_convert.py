"""GGUF -> a Hugging Face directory. No torch.

The weights come out as float32, dequantised exactly, one tensor in memory at a time.
"""

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from engine.gguf_tokenizer import write_tokenizer
from protos.errors import ModelUnusable

_Floats = npt.NDArray[np.float32]
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def convert(gguf: Path, out: Path, progress: Callable[[str], None]) -> None:
    """Write config.json, model.safetensors, tokenizer.json and their companions under `out`, which is made.

    Raises `ModelUnusable` for a file that is broken, cut short or of an architecture that is not built.
    """
    try:
        _convert(gguf, out, progress)
    except (ModelUnusable, OSError):
        raise
    except KeyError as error:
        raise _broken(gguf, f"it has no {error}") from error
    except Exception as error:  # reading fails in whatever way a wrong byte leads to
        raise _broken(gguf, f"{type(error).__name__}: {error}") from error


def _convert(gguf: Path, out: Path, progress: Callable[[str], None]) -> None:
    progress(f"reading {gguf.name}")
    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    out.mkdir(parents=True)
    tensors = _renamed(reader.tensors, gguf)
    config = _config(metadata, tensors, gguf)
    _write_json(out / "config.json", config)
    write_tokenizer(metadata, out, gguf)
    progress(f"converting {len(tensors)} tensors to float32")
    _write_weights(out / "model.safetensors", tensors, config, gguf)


def _broken(gguf: Path, why: str) -> ModelUnusable:
    return ModelUnusable(f"{gguf} is broken or cut short ({why}): download it again", stage="load")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(metadata: dict[str, Any], tensors: dict[str, ReaderTensor], gguf: Path) -> dict[str, Any]:
    """What config.json says."""
    architecture = metadata["general.architecture"]
    if architecture not in _ARCHITECTURES:
        raise ModelUnusable(
            f"{gguf} is of architecture {architecture!r}, which is not built: choose one of "
            f"{', '.join(_ARCHITECTURES)}",
            stage="load",
        )

    def field(name: str, *default: Any) -> Any:
        key = f"{architecture}.{name}"
        return metadata.get(key, *default) if default else metadata[key]

    for name, plain in (("rope.scaling.type", "none"), ("attention.sliding_window", 0)):
        if field(name, plain) != plain:
            raise ModelUnusable(
                f"{gguf} has {name} = {field(name)!r}, which is not built for GGUF: use the model's safetensors",
                stage="load",
            )
    heads, hidden = field("attention.head_count"), field("embedding_length")
    return {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_size": hidden,
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", hidden // heads),
        "intermediate_size": field("feed_forward_length"),
        "vocab_size": int(tensors["model.embed_tokens.weight"].shape[1]),
        "max_position_embeddings": field("context_length"),
        # The file holds a float32: the decimal that it was made from is the shortest that rounds to it.
        "rms_norm_eps": float(str(np.float32(field("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(field("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def _renamed(tensors: list[ReaderTensor], gguf: Path) -> dict[str, ReaderTensor]:
    """By their Hugging Face names."""
    renamed: dict[str, ReaderTensor] = {}
    for tensor in tensors:
        in_layer = re.fullmatch(r"blk\.(\d+)\.(.+)", tensor.name)
        if in_layer and in_layer[2] in _IN_LAYER:
            renamed[f"model.layers.{in_layer[1]}.{_IN_LAYER[in_layer[2]]}"] = tensor
        elif tensor.name in _WHOLE:
            renamed[_WHOLE[tensor.name]] = tensor
        else:
            raise ModelUnusable(
                f"{gguf} holds the tensor {tensor.name!r}, which is not built: use the model's safetensors",
                stage="load",
            )
    return renamed


def _write_weights(path: Path, tensors: dict[str, ReaderTensor], config: dict[str, Any], gguf: Path) -> None:
    """A safetensors file: length of the header, header in JSON, data. The library would want all tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + int(tensor.n_elements) * 4
        shape = [int(size) for size in reversed(tensor.shape)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 8) % 4096)  # the data starts on a page of memory once the file is mapped
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for data in _dequantised(tensors, config, gguf):
            file.write(data.data)


def _dequantised(tensors: dict[str, ReaderTensor], config: dict[str, Any], gguf: Path) -> Iterator[_Floats]:
    for name, tensor in tensors.items():
        try:
            with np.errstate(all="ignore"):  # what a broken file overflows is caught below
                data = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError as error:
            raise ModelUnusable(
                f"{gguf} is quantised as {tensor.tensor_type.name}, which cannot be read: choose another file of it",
                stage="load",
            ) from error
        if not np.isfinite(data).all():
            raise _broken(gguf, f"{tensor.name} holds values that are no numbers")
        if config["model_type"] == "llama":
            data = _unpermuted(name, data, config)
        yield data


def _unpermuted(name: str, data: _Floats, config: dict[str, Any]) -> _Floats:
    """GGUF pairs the rows 2i and 2i + 1 of a head of q and k, Hugging Face the rows i and i + head_dim / 2."""
    if name.endswith("q_proj.weight"):
        heads = config["num_attention_heads"]
    elif name.endswith("k_proj.weight"):
        heads = config["num_key_value_heads"]
    else:
        return data
    pairs = data.reshape(heads, config["head_dim"] // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(data.shape)

"""The tokenizer inside a GGUF file -> tokenizer.json, tokenizer_config.json, generation_config.json."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from protos.errors import ModelUnusable

_CONTROL, _USER_DEFINED = 3, 4  # token types in the file
# How text is cut before BPE, as the models' own tokenizer.json files say it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(metadata: dict[str, Any], out: Path, gguf: Path) -> None:
    """Write the three files under `out`. `metadata` are the file's fields; a missing one is a KeyError.

    Raises `ModelUnusable` for a kind of tokenizer that is not built.
    """
    kind, cut = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "")
    if kind != "gpt2" or cut not in ("smollm", "gpt-2", "llama-bpe", "qwen2"):
        raise ModelUnusable(
            f"{gguf} has a tokenizer of kind {kind}/{cut}, which is not built for GGUF: use the model's safetensors",
            stage="load",
        )
    _tokenizer(metadata, cut).save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", _settings(metadata))
    _write_json(out / "generation_config.json", _generation(metadata))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer(metadata: dict[str, Any], cut: str) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=cut == "llama-bpe",
        )
    )
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            token for token, this in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if this == kind
        ]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    if metadata.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe"):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _pre_tokenizer(cut: str) -> pre_tokenizers.PreTokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut == "gpt-2":
        return plain
    if cut == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    words = Regex(_WORDS.format(digits="{1,3}" if cut == "llama-bpe" else ""))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json. The class is the one that takes tokenizer.json as it is."""
    tokens = metadata["tokenizer.ggml.tokens"]
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name in ("bos", "eos", "unknown", "padding"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            settings[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[token]
    settings["model_max_length"] = metadata[f"{metadata['general.architecture']}.context_length"]
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return settings


def _generation(metadata: dict[str, Any]) -> dict[str, Any]:
    eos, turn = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    ends = sorted({token for token in (eos, turn) if token is not None})
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }

"""GGUF files of our own making come back as the safetensors model that they were made from."""

import contextlib
import json
import random

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import oracle
from engine.gguf_convert import convert
from protos.errors import ModelUnusable
from tiny_gguf import make_tiny_gguf
from tiny_model import CHAT_TEMPLATE, EOS_ID, make_tiny_model


def quiet(_line):
    pass


@pytest.mark.parametrize(
    "options",
    [{}, {"tied": True}, {"architecture": "qwen2"}, {"architecture": "qwen3", "kv_heads": 1}, {"head_dim": 32}],
    ids=str,
)
def test_float_weights_come_back_exactly(tmp_path, options):
    source = make_tiny_model(tmp_path / "source", **options)
    pre = "qwen2" if "qwen" in options.get("architecture", "") else "smollm"
    convert(make_tiny_gguf(source, tmp_path / "a.gguf", pre=pre), tmp_path / "out", quiet)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_array_equal(weight, after[name], err_msg=name)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    del ours["torch_dtype"], theirs["dtype"]
    assert ours == theirs


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_0", "F16", "BF16"])
def test_quantised_weights_are_near(tmp_path, kind):
    source = make_tiny_model(tmp_path / "source")
    quantisation = gguf.GGMLQuantizationType[kind]
    convert(make_tiny_gguf(source, tmp_path / "a.gguf", quantisation=quantisation), tmp_path / "out", quiet)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in load_file(source / "model.safetensors").items():
        assert after[name].dtype == np.float32
        error = np.abs(after[name] - weight).max() / np.abs(weight).max()
        assert error < {"Q4_1": 0.1, "Q4_0": 0.1}.get(kind, 0.01), name


def test_transformers_reads_what_is_written(tmp_path):
    source = make_tiny_model(tmp_path / "source")
    convert(make_tiny_gguf(source, tmp_path / "a.gguf"), tmp_path / "out", quiet)
    ids = [random.Random(3).randrange(300) for _ in range(50)]
    np.testing.assert_array_equal(oracle.logits(source, ids), oracle.logits(tmp_path / "out", ids))


def test_tokenizer_and_companions(tmp_path):
    source = make_tiny_model(tmp_path / "source")
    convert(make_tiny_gguf(source, tmp_path / "a.gguf"), tmp_path / "out", quiet)
    before, after = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (source, tmp_path / "out"))
    assert before.get_vocab() == after.get_vocab()
    text = "The cat is on the mat<|im_end|>\n with you 🙂"
    assert after.encode(text).ids == before.encode(text).ids
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == CHAT_TEMPLATE
    assert (settings["bos_token"], settings["eos_token"]) == ("<|endoftext|>", "<|im_end|>")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, EOS_ID)


def test_smollm_cuts_digits_one_by_one(demo_model):
    tokenizer = Tokenizer.from_file(str(demo_model.path / "tokenizer.json"))
    assert tokenizer.encode("in 2024  7x").tokens == ["in", "Ġ", "2", "0", "2", "4", "ĠĠ", "7", "x"]


@pytest.mark.parametrize(("pre", "pieces"), [("llama-bpe", ["123", "45"]), ("qwen2", ["1", "2", "3", "4", "5"])])
def test_other_ways_to_cut_text(tmp_path, pre, pieces):
    source = make_tiny_model(tmp_path / "source", architecture="qwen2")
    convert(make_tiny_gguf(source, tmp_path / "a.gguf", pre=pre), tmp_path / "out", quiet)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    cut = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("We'll see 12345 \n\n x")]
    assert cut == ["We", "'ll", "Ġsee", "Ġ", *pieces, "ĠĊĊ", "Ġx"]
    assert (tokenizer.encode("x").ids[0] == 0) == (pre == "llama-bpe")  # that one begins with bos


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "mamba"}, "architecture 'mamba', which is not built: choose"),
        ({"block_count": None}, "broken or cut short .it has no 'llama.block_count'.: download it again"),
        ({"attention.head_count": "four"}, "broken or cut short .*: download it again"),
        ({"attention.head_count": 0}, "broken or cut short .*: download it again"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn', which is not built for GGUF: use the model's"),
        ({"attention.sliding_window": 64}, "attention.sliding_window = 64, which is not built for GGUF: use"),
        ({"pre": "deepseek-llm"}, "tokenizer of kind gpt2/deepseek-llm.*use the model's safetensors"),
        ({"add": {"rope_freqs.weight": np.ones(8, np.float32)}}, "'rope_freqs.weight', which is not built"),
        ({"leave_out": ("model.embed_tokens.weight",)}, "it has no 'model.embed_tokens.weight'"),
    ],
    ids=str,
)
def test_what_cannot_be_used(tmp_path, options, message):
    source = make_tiny_model(tmp_path / "source")
    file = make_tiny_gguf(source, tmp_path / "a.gguf", **options)
    with pytest.raises(ModelUnusable, match=message) as raised:
        convert(file, tmp_path / "out", quiet)
    assert "a.gguf" in str(raised.value)


def test_values_that_are_no_numbers(tmp_path):
    source = make_tiny_model(tmp_path / "source")
    file = make_tiny_gguf(source, tmp_path / "a.gguf")
    weight = load_file(source / "model.safetensors")["model.norm.weight"].tobytes()
    data = file.read_bytes()
    at = data.index(weight)
    file.write_bytes(data[:at] + np.float32(np.nan).tobytes() + data[at + 4 :])
    with pytest.raises(ModelUnusable, match=r"output_norm.weight holds values that are no numbers"):
        convert(file, tmp_path / "out", quiet)


def test_cut_short_and_overwritten_files(tmp_path):
    """Wherever a file ends, and whatever bytes its head holds, it is refused in words or read."""
    source = make_tiny_model(tmp_path / "source", layers=1)
    whole = make_tiny_gguf(source, tmp_path / "a.gguf").read_bytes()
    rng = random.Random(4)
    file = tmp_path / "b.gguf"
    for trial, end in enumerate([0, 1, 4, 20, *(rng.randrange(len(whole)) for _ in range(40)), len(whole) - 1]):
        file.write_bytes(whole[:end])
        with pytest.raises(ModelUnusable, match=r"broken or cut short.*download it again"):
            convert(file, tmp_path / f"cut-{trial}", quiet)
    for trial in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(4000 if trial % 2 else 400)] = rng.randrange(256)
        file.write_bytes(data)
        with contextlib.suppress(ModelUnusable):
            convert(file, tmp_path / f"overwritten-{trial}", quiet)

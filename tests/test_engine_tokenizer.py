"""Token ids are transformers' ids, and ids become the bytes that they came from."""

import json
import random
import threading
import time
import warnings

import pytest
import tokenizers
from tokenizers import decoders

from engine.tokenizer import Tokenizer
from protos.errors import InvalidRequest, ModelUnusable
from tiny_model import CHAT_TEMPLATE, EOS_ID, make_sentencepiece_model, make_tiny_model

TEXTS = [
    "",
    " ",
    "Hello, world! It's   2024\t\n\n and we've 12,345.67 reasons.",
    "naïve façade — “quoted” … ½ ² ﬁ",
    "日本語のテキスト、中文，한국어",
    "👩‍👩‍👧‍👦 🇺🇳 🙂🙃 e\u0301 \u200d\ufeff",
    "مرحبا بالعالم שלום",
    "def f(x):\n\treturn x ** 2  # comment\r\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "a" * 500,
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tokenizer.from_dir(make_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def smollm(demo_model):
    return Tokenizer.from_dir(demo_model.path)


@pytest.fixture(scope="module")
def reference(demo_model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(demo_model.path)


def test_sizes_and_ends(tiny, smollm):
    assert (smollm.vocab_size, smollm.eos_token_ids) == (49152, (2,))
    assert tiny.eos_token_ids == (EOS_ID,)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_as_transformers_does(smollm, reference, text):
    assert smollm.encode(text) == reference(text)["input_ids"]


def test_chat_as_transformers_does(smollm, reference):
    messages = [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "  And of  Norway? 🇳🇴"},
    ]
    for chat in (messages, messages[1:2]):
        expected = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert smollm.apply_chat(chat) == expected


@pytest.mark.parametrize("text", TEXTS[:-2])
def test_round_trips(tiny, smollm, text):
    assert tiny.decode(tiny.encode(text)) == text
    assert smollm.decode(smollm.encode(text)) == text


def test_decode_of_any_ids_as_transformers_does(smollm, reference):
    rng = random.Random(5)
    for _ in range(50):
        ids = [rng.choice((rng.randrange(49152), rng.randrange(17, 300))) for _ in range(30)]
        assert smollm.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_every_byte(tiny):
    """The tiny tokenizer has an id for each byte, so every character and every broken sequence can be written."""
    everything = [tiny.token_bytes(token_id) for token_id in range(tiny.vocab_size)]
    single = {data[0]: token_id for token_id, data in enumerate(everything) if len(data) == 1}
    assert sorted(single) == list(range(256))
    for first in range(0, 0x110000, 4099):
        if not 0xD800 <= first < 0xE000:
            assert tiny.decode(tiny.encode(chr(first))) == chr(first)
    broken = bytes(range(256)) + b"\xe2\x82" + b"a\xf0\x9f\x99"
    assert tiny.decode([single[byte] for byte in broken]) == broken.decode("utf-8", "replace")


def test_special_and_unknown_ids_have_no_text(tiny):
    for token_id in (0, EOS_ID, tiny.vocab_size, 2**31, 2**40, -1):
        assert tiny.token_bytes(token_id) == b""
    assert tiny.decode([0, *tiny.encode("hi"), EOS_ID]) == "hi"


def test_text_that_is_no_unicode(tiny):
    with pytest.raises(InvalidRequest) as raised:
        tiny.encode("a\ud800b")
    assert raised.value.field == "text"


def test_encoding_lets_other_threads_run(smollm):
    """The router's event loop must not stand still while megabytes are encoded."""
    text = "The quick brown fox jumps over the lazy dog. " * 40_000
    worker = threading.Thread(target=smollm.encode, args=(text,))
    worker.start()
    turns = 0
    while worker.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20


def test_a_model_without_template(tmp_path):
    path = make_tiny_model(tmp_path)
    (path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_dir(path)
    with pytest.raises(InvalidRequest, match="no chat template: send text instead") as raised:
        tokenizer.apply_chat([{"role": "user", "content": "hi"}])
    assert raised.value.field == "chat"
    assert tokenizer.encode("hi")


def test_bos_comes_before_a_plain_prompt_only(tmp_path):
    path = make_tiny_model(tmp_path)
    data = json.loads((path / "tokenizer.json").read_text())
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.encode("hi")[0] == 0
    assert tokenizer.apply_chat([{"role": "user", "content": "hi"}])[0] == 1


def test_fingerprint_is_of_the_content(tmp_path):
    one, two = make_tiny_model(tmp_path / "1"), make_tiny_model(tmp_path / "2", seed=9)
    assert Tokenizer.from_dir(one).fingerprint == Tokenizer.from_dir(two).fingerprint
    file = two / "tokenizer.json"
    file.write_text(file.read_text().replace('"special": true', '"special": false', 1))
    assert Tokenizer.from_dir(one).fingerprint != Tokenizer.from_dir(two).fingerprint


def test_sentencepiece(tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(make_sentencepiece_model(tmp_path) / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.strips_first_space
    for text in ("hi", "hi hi", " hi", "hi  é 🙂 hi", "日本"):
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == backend.decode(ids) == text


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"], ids=str)
def test_missing_and_broken_files(tmp_path, content):
    file = make_tiny_model(tmp_path) / "tokenizer.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ModelUnusable, match=r"tokenizer.json .*: fetch the model's files again"):
        Tokenizer.from_dir(tmp_path)


def test_a_decoder_that_is_not_built(tmp_path):
    file = make_tiny_model(tmp_path) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.decoder = decoders.WordPiece()
    backend.save(str(file))
    with pytest.raises(ModelUnusable, match="decodes by WordPiece, which is not built: choose a model"):
        Tokenizer.from_dir(tmp_path)


def test_a_template_that_does_not_parse(tmp_path):
    path = make_tiny_model(tmp_path)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{% endfor %}")
    with pytest.raises(ModelUnusable, match="chat template does not parse"):
        Tokenizer.from_dir(path)

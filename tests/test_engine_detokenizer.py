"""Streams of ids become the text that decoding them at once gives, in whole characters."""

import random
import unicodedata

import pytest

from engine.detokenizer import Detokenizer
from engine.tokenizer import Tokenizer
from tiny_model import EOS_ID, make_sentencepiece_model, make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tokenizer.from_dir(make_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def smollm(demo_model):
    return Tokenizer.from_dir(demo_model.path)


@pytest.fixture(params=["tiny", "smollm"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def pieces(tokenizer, ids, cut=lambda: 1):
    detokenizer = Detokenizer(tokenizer)
    out, at = [], 0
    while at < len(ids):
        count = cut()
        out.append(detokenizer.push(ids[at : at + count]))
        at += count
    return [*out, detokenizer.flush()]


def random_text(rng, length):
    planes = [(0x20, 0x7F), (0xA0, 0x600), (0x3040, 0x9FFF), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF)]
    chars = (chr(rng.randrange(*rng.choice(planes))) for _ in range(length))
    return "".join(char for char in chars if unicodedata.category(char) != "Cs")


@pytest.mark.parametrize(
    "text", ["", "plain words", "naïve — “quoted” ½", "日本語、한국어", "👩‍👩‍👧‍👦 🇺🇳 e\u0301 🙂🙃", "مرحبا"]
)
def test_texts_id_by_id(tokenizer, text):
    out = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


def test_random_unicode_in_random_pushes(tiny):
    """Every character comes whole, and as soon as its last byte is there."""
    rng = random.Random(6)
    for _ in range(100):
        text = random_text(rng, 40)
        ids = tiny.encode(text)
        out = pieces(tiny, ids, lambda: rng.choice((0, 1, 1, 2, 3, 7)))
        assert "".join(out) == text
        assert out[-1] == ""
        assert not any("\ufffd" in piece for piece in out)


def test_random_ids_equal_decoding_at_once(tokenizer):
    """Ids as a model at its worst may choose them: cut characters, stray bytes, special tokens."""
    rng = random.Random(7)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(40))]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_replacement_character_of_the_text_itself_is_kept(tiny):
    assert "".join(pieces(tiny, tiny.encode("a\ufffdb"))) == "a\ufffdb"


def test_characters_are_held_until_whole(tiny):
    ids = tiny.encode("x🙂y")
    assert [len(tiny.token_bytes(token)) for token in ids] == [1] * 6
    assert pieces(tiny, ids) == ["x", "", "", "", "🙂", "y", ""]


def test_an_incomplete_end_is_shown_at_the_end(tiny):
    ids = tiny.encode("x🙂")[:-1]
    assert pieces(tiny, ids) == ["x", "", "", "", "\ufffd"]


def test_bytes_that_no_character_begins_with_do_not_hold_up_the_stream(tiny):
    stray = next(token for token in range(tiny.vocab_size) if tiny.token_bytes(token) == b"\x80")
    assert pieces(tiny, [stray, *tiny.encode("a")]) == ["\ufffd", "a", ""]


def test_special_tokens_are_no_text_and_do_not_part_a_character(tiny):
    ids = tiny.encode("🙂")
    assert "".join(pieces(tiny, [*ids[:2], EOS_ID, *ids[2:]])) == "🙂"


def test_sentencepiece_drops_the_first_space_only(tmp_path):
    tokenizer = Tokenizer.from_dir(make_sentencepiece_model(tmp_path))
    for text in ("hi hi", " hi  hi", "é🙂hi", ""):
        assert "".join(pieces(tokenizer, tokenizer.encode(text))) == text

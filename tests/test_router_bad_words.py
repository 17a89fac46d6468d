"""Texts become the runs of ids that write them."""

import pytest

from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from protos.errors import InvalidRequest
from router.bad_words import with_bad_words
from tiny_model import make_sentencepiece_model, make_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_dir(make_tiny_model(tmp_path_factory.mktemp("model")))


def runs(tokenizer, *words, tokens=()):
    return with_bad_words(SamplingParams(bad_words=words, bad_tokens=tokens), tokenizer).bad_tokens


def test_nothing_is_made_of_nothing(tokenizer):
    params = SamplingParams(bad_tokens=((1, 2),))
    assert with_bad_words(params, tokenizer) is params


def test_a_word_is_found_at_a_beginning_and_behind_a_space(tokenizer):
    alone, behind = runs(tokenizer, "theory")
    assert tokenizer.decode(alone) == "theory"
    assert tokenizer.decode(behind) == " theory"
    assert len(runs(tokenizer, "the")[1]) == 1  # " the" is one token


def test_a_word_is_the_same_with_a_space_in_front(tokenizer):
    assert runs(tokenizer, " the") == runs(tokenizer, "the") == runs(tokenizer, "the", " the")


def test_runs_that_were_given_stay_and_none_comes_twice(tokenizer):
    the = tuple(tokenizer.encode_part("the"))
    assert runs(tokenizer, "the", tokens=((5, 6), the)) == ((5, 6), the, tuple(tokenizer.encode_part(" the")))


def test_nothing_is_put_before_a_word(tmp_path):
    """No begin-of-sequence id: a run with it would never be found."""
    tokenizer = Tokenizer.from_dir(make_sentencepiece_model(tmp_path / "model"))
    assert (tuple(tokenizer.encode_part("hi"))) in runs(tokenizer, "hi")
    assert all(1 not in run for run in runs(tokenizer, "hi"))


def test_what_is_too_long_or_too_much_names_the_field(tokenizer):
    for words, tokens in ((("ü" * 17,), ()), (("a", "b"), tuple((i, i) for i in range(253)))):
        with pytest.raises(InvalidRequest) as caught:
            runs(tokenizer, *words, tokens=tokens)
        assert caught.value.field == "bad_words"
    assert len(runs(tokenizer, "a", "b", tokens=tuple((i, i) for i in range(252)))) == 256

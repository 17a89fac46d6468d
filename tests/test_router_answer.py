"""Where an answer ends, and which tokens and text belong to it."""

import pytest

from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from router.answer import LENGTH, STOP, Answer
from tiny_model import make_tiny_model

END = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_dir(make_tiny_model(tmp_path_factory.mktemp("model")))


def answer(tokenizer, **sampling) -> Answer:
    return Answer(tokenizer, SamplingParams(**({"max_tokens": 100} | sampling)), frozenset({END}))


def feed(answer: Answer, ids: list[int], step: int):
    """Push in groups of `step`; (ids, text, reason) put together, up to the end."""
    taken, text = [], ""
    for start in range(0, len(ids), step):
        piece = answer.push(ids[start : start + step])
        taken, text = taken + piece.token_ids, text + piece.text
        if piece.finish is not None:
            return taken, text, piece.finish
    return taken, text, None


@pytest.mark.parametrize("step", [1, 2, 3, 100])
class TestHoweverTokensAreGrouped:
    def test_an_end_id_is_a_token_but_no_text(self, tokenizer, step):
        ids = tokenizer.encode("yes")
        assert feed(answer(tokenizer), [*ids, END, 9, 9], step) == ([*ids, END], "yes", STOP)

    def test_max_tokens_end_it(self, tokenizer, step):
        ids = tokenizer.encode("abcdef")
        assert feed(answer(tokenizer, max_tokens=4), ids, step) == (ids[:4], "abcd", LENGTH)

    def test_an_end_id_at_max_tokens_is_a_stop(self, tokenizer, step):
        ids = [*tokenizer.encode("abc"), END]
        assert feed(answer(tokenizer, max_tokens=4), ids, step) == (ids, "abc", STOP)

    def test_a_stop_string_cuts_the_text_but_not_its_tokens(self, tokenizer, step):
        ids = tokenizer.encode("abXYcd")
        assert feed(answer(tokenizer, stop=("XY",)), ids, step) == (ids[:4], "ab", STOP)

    def test_a_stop_string_at_max_tokens_is_a_stop(self, tokenizer, step):
        ids = tokenizer.encode("abXY")
        assert feed(answer(tokenizer, stop=("XY",), max_tokens=4), ids, step) == (ids, "ab", STOP)

    def test_what_only_began_a_stop_string_comes_out_at_the_end(self, tokenizer, step):
        ids = tokenizer.encode("abX")
        assert feed(answer(tokenizer, stop=("XY",), max_tokens=3), ids, step) == (ids, "abX", LENGTH)
        assert feed(answer(tokenizer, stop=("XY",)), [*ids, END], step) == ([*ids, END], "abX", STOP)

    def test_a_character_is_given_out_whole(self, tokenizer, step):
        ids = tokenizer.encode("a🙂b")
        assert feed(answer(tokenizer, max_tokens=len(ids)), ids, step) == (ids, "a🙂b", LENGTH)

    def test_a_character_that_stays_cut_is_a_replacement(self, tokenizer, step):
        ids = tokenizer.encode("a🙂")[:3]
        assert feed(answer(tokenizer, max_tokens=3), ids, step) == (ids, "a\ufffd", LENGTH)

    @pytest.mark.parametrize(("least", "taken", "text"), [(0, 4, "ab"), (3, 4, "abX"), (4, 8, "abXYcd"), (9, 9, None)])
    def test_the_first_tokens_are_not_searched_for_stop_strings(self, tokenizer, step, least, taken, text):
        ids = [*tokenizer.encode("abXYcdXY"), END]
        growing = answer(tokenizer, stop=("XY", "Y"), min_tokens=least)
        assert feed(growing, ids, step) == (ids[:taken], "abXYcdXY" if text is None else text, STOP)

    def test_nor_are_those_of_an_answer_that_has_no_others(self, tokenizer, step):
        ids = tokenizer.encode("abXY")
        growing = answer(tokenizer, stop=("XY",), min_tokens=4, max_tokens=4)
        assert feed(growing, ids, step) == (ids, "abXY", LENGTH)


def test_the_worker_may_end_it(tokenizer):
    growing = answer(tokenizer, stop=("XY",))
    growing.push(tokenizer.encode("abX"))
    piece = growing.close(LENGTH)
    assert (piece.token_ids, piece.text, piece.finish) == ([], "X", LENGTH)


def test_tokens_are_counted(tokenizer):
    growing = answer(tokenizer)
    growing.push([5, 6])
    growing.push([END, 7])
    assert growing.tokens == 3

"""Stop strings end an answer at the same character however the text is cut."""

import random

import pytest

from engine.stop_strings import StopStrings


def run(stops, pieces):
    """(what was given out before the flush, all that was given out, whether it stopped)."""
    search = StopStrings(stops)
    out = ""
    for piece in pieces:
        text, stopped = search.push(piece)
        out += text
        if stopped:
            assert search.flush() == ""
            return out, out, True
    return out, out + search.flush(), False


@pytest.mark.parametrize(
    ("stops", "pieces", "given", "stopped"),
    [
        ([], ["abc", "def"], "abcdef", False),
        (["END"], ["abc END def"], "abc ", True),
        (["END"], ["abc E", "N", "D def"], "abc ", True),
        (["END"], ["E", "EN", "D"], "E", True),
        (["END"], ["abc EN"], "abc EN", False),
        (["aab"], ["aaa", "b"], "a", True),
        (["abab"], ["aba", "cabab"], "abac", True),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", True),
        (["🙂🙃"], ["x🙂", "🙃y"], "x", True),
        (["xyz", "b"], ["axy", "b"], "axy", True),
        (["abc", "b"], ["abc"], "a", True),  # the one that is complete first
        (["abc", "bc"], ["abc"], "", True),  # both complete at once: the one that starts first
        (["x"], ["x"], "", True),
    ],
)
def test_where_an_answer_ends(stops, pieces, given, stopped):
    assert run(stops, pieces)[1:] == (given, stopped)
    assert run(stops, list("".join(pieces)))[1:] == (given, stopped)


def test_only_a_possible_start_is_held_back():
    search = StopStrings(["STOP", "\nUser:"])
    assert search.push("Hello S") == ("Hello ", False)
    assert search.push("T") == ("", False)
    assert search.push("ART\nUse") == ("START", False)
    assert search.push("d") == ("\nUsed", False)
    assert search.push("S") == ("", False)
    assert search.flush() == "S"
    assert search.flush() == ""


def first_end(text, stops):
    """By definition: the shortest beginning of the text that ends in a stop string."""
    for end in range(len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


def test_random_cuts_make_no_difference():
    rng = random.Random(8)
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        text = "".join(rng.choices("abc", weights=(5, 5, 2), k=rng.randrange(20)))
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        before_flush, all_of_it, stopped = run(stops, pieces)
        assert (all_of_it, stopped) == first_end(text, stops), (stops, pieces)
        assert all_of_it.startswith(before_flush)
        assert len(all_of_it) - len(before_flush) < max(map(len, stops))

"""How long answers get, as far as the finished ones tell. Pure policy: no clock, no pages."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from operator import neg
from typing import Protocol

_GROWTH = 1.25  # each bin of lengths is so much wider than the one before
_EDGES = (0.0, *(8 * _GROWTH**step for step in range(45)), 2.0**31)  # tokens; the last is more than anyone may ask for
_BINS = len(_EDGES) - 1
_PRIOR = 1.0  # answers that never end, among those that were seen
_PERIOD, _FADE = 64, 0.9  # of what was seen, so much is kept after each period of answers


class Expectation(Protocol):
    """What is expected of an answer's length."""

    def note(self, length: int, ended: bool) -> None:
        """An answer of `length` tokens is over; `ended` says that it was not cut off at its own limit."""

    def expected(self, answered: int, most: int, share: float) -> int:
        """Tokens that `share` of the answers which have got to `answered` do not exceed, where they get at most `most`:
        above `answered`, as far as that allows.
        """


class AnswerLengths(Expectation):
    """The distribution of lengths, by the product-limit estimator (Kaplan and Meier, 1958): an answer that was cut off
    says only that answers can get so long.

    Until something is known every answer is expected to get as long as it may; so is one that outlives all others.
    """

    def __init__(self) -> None:
        self._ended = [0.0] * _BINS
        self._cut = [0.0] * _BINS
        self._noted = 0
        self._reckon()

    def note(self, length: int, ended: bool) -> None:
        (self._ended if ended else self._cut)[_bin(length)] += 1.0
        self._noted += 1
        if self._noted % _PERIOD == 0:
            self._ended = [count * _FADE for count in self._ended]
            self._cut = [count * _FADE for count in self._cut]
        self._reckon()

    def expected(self, answered: int, most: int, share: float) -> int:
        bin_ = _bin(answered)
        left = (1.0 - share) * _between(answered, _EDGES[bin_ : bin_ + 2], self._alive[bin_ : bin_ + 2])
        end = bisect_left(self._alive, -left, key=neg)  # the first edge that so few get to
        if end > _BINS:
            return most
        length = _between(left, self._alive[end - 1 : end + 1], _EDGES[end - 1 : end + 1])
        return min(most, max(answered + 1, math.ceil(length)))

    def _reckon(self) -> None:
        """The share of answers that reach each edge."""
        at_risk = _PRIOR + sum(self._ended) + sum(self._cut)
        self._alive = [1.0]
        for ended, cut in zip(self._ended, self._cut, strict=True):
            self._alive.append(self._alive[-1] * (1.0 - ended / at_risk))
            at_risk -= ended + cut


def _bin(length: int) -> int:
    return max(0, bisect_left(_EDGES, length) - 1)


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Where the line through two points is at x; the points' x differ."""
    return ys[0] + (x - xs[0]) / (xs[1] - xs[0]) * (ys[1] - ys[0])

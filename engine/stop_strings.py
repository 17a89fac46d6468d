"""Ending an answer at a stop string, wherever token borders fall."""

from collections.abc import Sequence


class StopStrings:
    """One stream's search for its stop strings. How the text is cut into pushes makes no difference."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be given out now, whether a stop string has come).

        Text that may turn out to be the start of a stop string is held back. The stop string that is complete first
        ends the answer; neither it nor what follows is given out.
        """
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        hold = self._start_of_stop(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def flush(self) -> str:
        """The end of the stream: what was held back."""
        held, self._held = self._held, ""
        return held

    def _start_of_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

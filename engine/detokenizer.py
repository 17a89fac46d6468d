"""Token ids to text, as they come."""

import codecs
from collections.abc import Iterable

from engine.tokenizer import Tokenizer


class Detokenizer:
    """One stream's text. What it gives out, put together, is `Tokenizer.decode` of all its ids.

    A character whose bytes come in several tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strips_first_space

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._text(b"".join(map(self._tokenizer.token_bytes, ids)), last=False)

    def flush(self) -> str:
        """The end of the stream: U+FFFD where a character stayed incomplete, else nothing."""
        return self._text(b"", last=True)

    def _text(self, data: bytes, *, last: bool) -> str:
        text = self._decoder.decode(data, last)
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

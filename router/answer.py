"""One answer as it grows: text out of token ids, and where it ends."""

from dataclasses import dataclass

from engine.detokenizer import Detokenizer
from engine.sampling_params import SamplingParams
from engine.stop_strings import StopStrings
from engine.tokenizer import Tokenizer
from protos.v1 import common_pb2

STOP = common_pb2.FINISH_REASON_STOP
LENGTH = common_pb2.FINISH_REASON_LENGTH


@dataclass(frozen=True)
class Piece:
    """What new tokens add. `token_ids` are those that count: none behind the answer's end."""

    token_ids: list[int]
    text: str  # whole characters, and nothing that may still become a stop string
    finish: common_pb2.FinishReason | None


class Answer:
    """Ends at an end id (which is a token of the answer, but no text of it), a stop string or `max_tokens`.

    Stop strings are looked for behind the text of the first `min_tokens` tokens.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, end_ids: frozenset[int]) -> None:
        self.tokens = 0
        self._max_tokens = sampling.max_tokens
        self._min_tokens = sampling.min_tokens
        self._end_ids = end_ids
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(sampling.stop)

    def push(self, token_ids: list[int]) -> Piece:
        """Take tokens in order, up to the answer's end."""
        text = ""
        for index, token in enumerate(token_ids):
            more, finish = self._take(token)
            text += more
            if finish is not None:
                return Piece(token_ids[: index + 1], text, finish)
        return Piece(token_ids, text, None)

    def close(self, reason: common_pb2.FinishReason) -> Piece:
        """The worker says that the answer ends here: let out what was held back."""
        text, stopped = self._flush()
        return Piece([], text, STOP if stopped else reason)

    def _take(self, token: int) -> tuple[str, common_pb2.FinishReason | None]:
        self.tokens += 1
        if token in self._end_ids:
            return self._flush()[0], STOP
        text, stopped = self._detokenizer.push([token]), False
        if self.tokens > self._min_tokens:
            text, stopped = self._stops.push(text)
        if stopped:
            return text, STOP
        if self.tokens < self._max_tokens:
            return text, None
        rest, stopped = self._flush()
        return text + rest, STOP if stopped else LENGTH

    def _flush(self) -> tuple[str, bool]:
        text, stopped = self._stops.push(self._detokenizer.flush())
        return text + ("" if stopped else self._stops.flush()), stopped

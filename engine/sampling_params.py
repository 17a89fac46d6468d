"""How a request's next tokens are chosen. No torch: the router checks these."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from protos.errors import InvalidRequest
from protos.v1 import common_pb2

MAX_TOKENS = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_STOP_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 128
MAX_BAD_SEQUENCES = 256
MAX_BAD_SEQUENCE_IDS = 32
MAX_LOGPROBS = 20
MAX_ID = 2**32 - 1
_GREEDY_BELOW = 1e-5  # at such temperatures only the most probable token is left
_REPEATED = {
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logit_bias",
    "bad_words",
    "bad_tokens",
}  # never absent in a message


@dataclass(frozen=True)
class SamplingParams:
    """Logits change in this order: bias, bans, repetition, frequency and presence penalties, temperature. Of what they
    then say the `top_k` most probable tokens are kept, of these the fewest that make up `top_p`, and of these the ones
    that are at least `min_p` times as probable as the first. Of equals, lower ids go first.

    Log-probabilities are of the logits before any of this.
    """

    max_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # for tokens of prompt or answer: l / r where l > 0, else l * r
    frequency_penalty: float = 0.0  # subtracted for each time that the answer has the token
    presence_penalty: float = 0.0  # subtracted where the answer has the token
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added), by id
    seed: int = 0  # unsigned, 64 bits
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()  # for the router, which makes `bad_tokens` of them
    bad_tokens: tuple[tuple[int, ...], ...] = ()  # runs of ids that the answer must not have
    min_tokens: int = 0  # the first so many tokens do not end the answer
    ignore_eos: bool = False
    logprobs: int | None = None  # of each token, and of so many of the likeliest
    prompt_logprobs: int | None = None

    @cached_property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < _GREEDY_BELOW

    @cached_property
    def changes_logits(self) -> bool:
        """Whether anything but the temperature does."""
        return bool(self.logit_bias or self.bad_tokens or self.min_tokens or self.has_penalties)

    @cached_property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    def validate(self) -> None:
        """Raises `InvalidRequest` that names the first field at fault."""
        _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_int("top_k", self.top_k, 0, MAX_TOKENS)
        _check_int("seed", self.seed, 0, 2**64 - 1)
        _check_number("temperature", self.temperature, 0.0, 2.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, above=True)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_texts("stop", self.stop, MAX_STOPS, MAX_STOP_CHARS)
        _check_texts("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
        self._check_ids()
        self.check_min_tokens()
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _check_int(name, count, 0, MAX_LOGPROBS)

    def check_min_tokens(self) -> None:
        """Raises `InvalidRequest` where the answer cannot be so long."""
        _check_int("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, and the answer has at most {self.max_tokens}", field="min_tokens"
            )

    def _check_ids(self) -> None:
        _check_count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_IDS, "ids")
        _check_count("logit_bias", len(self.logit_bias), MAX_LOGIT_BIASES, "ids")
        _check_count("bad_tokens", len(self.bad_tokens), MAX_BAD_SEQUENCES, "runs of ids, bad_words among them,")
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, MAX_ID)
        for token_id, bias in self.logit_bias:
            _check_int("logit_bias", token_id, 0, MAX_ID)
            _check_number("logit_bias", bias, -100.0, 100.0)
        for run in self.bad_tokens:
            if not 0 < len(run) <= MAX_BAD_SEQUENCE_IDS:
                raise InvalidRequest(
                    f"a run of bad_tokens (or a bad word) has {len(run)} ids: 1 to {MAX_BAD_SEQUENCE_IDS} are wanted",
                    field="bad_tokens",
                )
            for token_id in run:
                _check_int("bad_tokens", token_id, 0, MAX_ID)

    @classmethod
    def from_proto(cls, message: common_pb2.SamplingParams, default_seed: int) -> "SamplingParams":
        """As the message says, unset fields by their defaults. Not validated."""
        names = (name for name in cls.__dataclass_fields__ if name not in _REPEATED)
        given: dict[str, Any] = {name: getattr(message, name) for name in names if message.HasField(name)}
        return cls(
            stop=tuple(message.stop),
            stop_token_ids=tuple(message.stop_token_ids),
            ignore_eos=message.ignore_eos,
            logit_bias=tuple(sorted(message.logit_bias.items())),
            bad_words=tuple(message.bad_words),
            bad_tokens=tuple(tuple(run.ids) for run in message.bad_tokens),
            **({"seed": default_seed} | given),
        )

    def to_proto(self) -> common_pb2.SamplingParams:
        """The message with every field set; fractions are rounded to float32 there."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["logit_bias"] = dict(self.logit_bias)
        values["bad_tokens"] = [common_pb2.TokenSequence(ids=run) for run in self.bad_tokens]
        return common_pb2.SamplingParams(**values)


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {value!r}: a whole number from {low} to {high} is wanted", field=name)


def _check_number(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """`above`: `low` itself is refused."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (above and value == low):
        wanted = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise InvalidRequest(f"{name} is {value!r}: a number {wanted} is wanted", field=name)


def _check_texts(name: str, texts: tuple[str, ...], most: int, chars: int) -> None:
    if len(texts) > most or not all(0 < len(text) <= chars for text in texts):
        raise InvalidRequest(f"{name} takes at most {most} texts of 1 to {chars} characters", field=name)


def _check_count(name: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise InvalidRequest(f"{name} takes at most {most} {what}, not {count}", field=name)

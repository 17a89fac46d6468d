"""How a request's next tokens are chosen. No torch: the router checks these."""

import math
from dataclasses import dataclass

from protos.errors import InvalidRequest
from protos.v1 import common_pb2

MAX_TOKENS = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_STOP_IDS = 256
_GREEDY_BELOW = 1e-5  # at such temperatures only the most probable token is left


@dataclass(frozen=True)
class SamplingParams:
    """Temperature first, then the `top_k` most probable tokens, of these the most probable that make up `top_p`."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 0  # unsigned, 64 bits
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < _GREEDY_BELOW

    def validate(self) -> None:
        """Raises `InvalidRequest` that names the first field at fault."""
        _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_int("top_k", self.top_k, 0, MAX_TOKENS)
        _check_int("seed", self.seed, 0, 2**64 - 1)
        if not _is_number(self.temperature) or not 0.0 <= self.temperature <= 2.0:
            raise InvalidRequest(
                f"temperature is {self.temperature!r}: a number from 0 to 2 is wanted", field="temperature"
            )
        if not _is_number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p is {self.top_p!r}: a number above 0 and at most 1 is wanted", field="top_p")
        if len(self.stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARS for text in self.stop):
            raise InvalidRequest(
                f"stop takes at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters", field="stop"
            )
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise InvalidRequest(f"stop_token_ids takes at most {MAX_STOP_IDS} ids", field="stop_token_ids")
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, 2**32 - 1)

    @classmethod
    def from_proto(cls, message: common_pb2.SamplingParams, default_seed: int) -> "SamplingParams":
        """As the message says, unset fields by their defaults. Not validated."""

        def given(name: str) -> bool:
            return message.HasField(name)

        return cls(
            max_tokens=message.max_tokens if given("max_tokens") else cls.max_tokens,
            temperature=message.temperature if given("temperature") else cls.temperature,
            top_k=message.top_k if given("top_k") else cls.top_k,
            top_p=message.top_p if given("top_p") else cls.top_p,
            seed=message.seed if given("seed") else default_seed,
            stop=tuple(message.stop),
            stop_token_ids=tuple(message.stop_token_ids),
            ignore_eos=message.ignore_eos,
        )

    def to_proto(self) -> common_pb2.SamplingParams:
        """The message with every field set; temperature and top_p are rounded to float32 there."""
        return common_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {value!r}: a whole number from {low} to {high} is wanted", field=name)


def _is_number(value: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Which requests are taken on. Everything that can be wrong with one is found here, before any worker hears of it."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from uuid import uuid4

from engine.sampling_params import SamplingParams
from kvstore.keys import pack_tokens
from protos.errors import InvalidRequest, Overloaded, UnknownModel
from protos.v1 import inference_pb2
from router.bad_words import with_bad_words
from router.prompt import PromptReader
from router.served_model import ServedModel
from router.tenant import Tenant

MAX_REQUEST_ID = 128  # characters
MAX_SAMPLING_BYTES = 256 * 1024
SEED_BITS = 63


@dataclass(frozen=True)
class Limits:
    """Tokens that the largest worker of each pool can hold in one sequence."""

    prefill: int
    decode: int


@dataclass(frozen=True)
class Admitted:
    """A request that is sound, as the workers are told it."""

    request_id: str
    token_ids: bytes  # little-endian uint32 each
    prompt_tokens: int
    sampling: SamplingParams
    end_ids: frozenset[int]  # every id that ends the answer
    tenant: Tenant


class Admission:
    """Counts the requests in flight and refuses those that are too many or wrong.

    `limits` says what the live workers can hold, `ttft_s` predicts the wait for a first token.
    """

    def __init__(
        self,
        model: ServedModel,
        prompts: PromptReader,
        max_inflight: int,
        limits: Callable[[], Limits],
        ttft_s: Callable[[], float],
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._max_inflight = max_inflight
        self._limits = limits
        self._ttft_s = ttft_s
        self.inflight: set[str] = set()

    @contextmanager
    def slot(self, wanted_id: str) -> Iterator[str]:
        """Hold one of the places in flight, under the request's id (a new one where none is wanted).

        Raises `Overloaded` where all are taken, `InvalidRequest` for an id that is unfit or in flight already.
        """
        request_id = wanted_id or uuid4().hex
        self._check_id(request_id)
        if len(self.inflight) >= self._max_inflight:
            wait = self._ttft_s()
            raise Overloaded(
                f"{self._max_inflight} requests are in flight, which is all that this router takes; "
                f"a first token is predicted to take {wait:.1f} s",
                retry_after_s=max(0.5, wait),
                request_id=request_id,
            )
        self.inflight.add(request_id)
        try:
            yield request_id
        finally:
            self.inflight.remove(request_id)

    def check_model(self, name: str) -> None:
        """Raises `UnknownModel` for any other than the one that is served; an empty name means that one."""
        if name not in ("", self._model.model_id):
            raise UnknownModel(f"no model {name[:200]!r} here, only {self._model.model_id!r}", stage="admission")

    async def admit(self, request: inference_pb2.GenerateRequest, request_id: str, tenant: Tenant) -> Admitted:
        """Check a request and tokenize its prompt. Raises `InvalidRequest` naming the field, or `UnknownModel`."""
        self.check_model(request.model)
        sampling = self._read_sampling(request)
        ids = await self._prompts.read(request)
        sampling = replace(
            sampling, max_tokens=self._fit(len(ids), sampling.max_tokens, request.sampling.HasField("max_tokens"))
        )
        sampling.check_min_tokens()  # what was not asked for may have shrunk
        eos = () if sampling.ignore_eos else self._model.config.eos_token_ids
        end_ids = frozenset((*eos, *sampling.stop_token_ids))
        self._check_choice(sampling, end_ids)
        return Admitted(
            request_id=request_id,
            token_ids=pack_tokens(ids),
            prompt_tokens=len(ids),
            sampling=sampling,
            end_ids=end_ids,
            tenant=tenant,
        )

    def _read_sampling(self, request: inference_pb2.GenerateRequest) -> SamplingParams:
        if request.sampling.ByteSize() > MAX_SAMPLING_BYTES:  # before anything is made of millions of stop ids
            raise InvalidRequest("the sampling parameters are too large", field="sampling")
        sampling = SamplingParams.from_proto(request.sampling, default_seed=secrets.randbits(SEED_BITS))
        sampling.validate()
        self._check_vocabulary("stop_token_ids", sampling.stop_token_ids)
        self._check_vocabulary("logit_bias", (token for token, _ in sampling.logit_bias))
        self._check_vocabulary("bad_tokens", chain.from_iterable(sampling.bad_tokens))
        return with_bad_words(sampling, self._model.tokenizer)

    def _check_vocabulary(self, field: str, ids: Iterable[int]) -> None:
        vocab = self._model.config.vocab
        for token in ids:
            if token >= vocab:
                raise InvalidRequest(f"id {token} is not below {vocab}, the size of the vocabulary", field=field)

    def _check_choice(self, sampling: SamplingParams, end_ids: frozenset[int]) -> None:
        """Some token must be left to choose at every position."""
        forbidden = len(sampling.bad_tokens) + (len(end_ids) if sampling.min_tokens else 0)
        if forbidden >= self._model.config.vocab:
            raise InvalidRequest("with so many tokens forbidden none may be left", field="bad_tokens")

    def _fit(self, prompt: int, max_tokens: int, asked: bool) -> int:
        """How many tokens the answer may have. A number that was asked for is kept or refused, the default shrinks."""
        context, limits = self._model.config.max_positions, self._limits()
        longest = min(context, limits.decode, limits.prefill) - 1
        if prompt > longest:
            why = f"the model's context is {context}" if longest == context - 1 else "no worker holds more"
            raise InvalidRequest(f"the prompt has {prompt} tokens and can have {longest}, for {why}", field="prompt")
        room = min(context, limits.decode) - prompt
        if max_tokens > room and asked:
            why = f"the model's context of {context}" if room == context - prompt else "what a worker holds"
            raise InvalidRequest(
                f"{max_tokens} tokens after a prompt of {prompt} pass {why}: at most {room} fit",
                field="max_tokens",
            )
        return min(max_tokens, room)

    def _check_id(self, request_id: str) -> None:
        if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
            raise InvalidRequest(
                f"a request id has at most {MAX_REQUEST_ID} characters, all printable", field="request_id"
            )
        if request_id in self.inflight:
            raise InvalidRequest("a request with this id is in flight", field="request_id", request_id=request_id)

"""The Python client of `diptych.v1.Inference`: asyncio, streaming, typed errors."""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypedDict, Unpack

import grpc
import grpc.aio

from protos import errors
from protos.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from rpc import status

DEFAULT_ENDPOINT = "127.0.0.1:50051"
_MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),  # a router that vanished is noticed while a slow answer is awaited
    ("grpc.keepalive_timeout_ms", 5_000),
]

FinishReason = Literal["stop", "length"]
Message = Mapping[str, str]  # {"role": "user", "content": "..."}
_FINISH: dict[int, FinishReason | None] = {
    common_pb2.FINISH_REASON_UNSPECIFIED: None,
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}


class Sampling(TypedDict, total=False):
    """How tokens are chosen. What is left out takes the router's default; docs/sampling.md says all of it."""

    max_tokens: int  # default 256
    temperature: float  # default 0: greedy
    top_k: int  # default 0: off
    top_p: float  # default 1: off
    min_p: float  # default 0: off
    repetition_penalty: float  # default 1: off
    frequency_penalty: float  # default 0: off
    presence_penalty: float  # default 0: off
    logit_bias: Mapping[int, float]  # added to the logits of these ids
    seed: int  # default: drawn by the router
    stop: Sequence[str]  # text that ends the answer and is not part of it
    stop_token_ids: Sequence[int]
    bad_words: Sequence[str]  # text that the answer must not have
    bad_tokens: Sequence[Sequence[int]]  # runs of ids that the answer must not have
    min_tokens: int  # default 0; the first so many tokens do not end the answer
    ignore_eos: bool  # default False
    logprobs: int  # default: none; of each token, and of so many of the likeliest
    prompt_logprobs: int  # default: none; the same for the prompt's tokens


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last one alone has a finish reason, usage and stats.

    Where they were asked for there is one of `logprobs` for each token; `prompt_logprobs`, from the prompt's second
    token on, come before the first token or with it.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[common_pb2.TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[common_pb2.TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: inference_pb2.Usage | None = None
    stats: inference_pb2.RequestStats | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. Log-probabilities are there where they were asked for, as in `Chunk`."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: inference_pb2.Usage
    stats: inference_pb2.RequestStats
    logprobs: tuple[common_pb2.TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[common_pb2.TokenLogprobs, ...] = ()


class Client:
    """Talks to one router at `endpoint` (host:port); connects when first used.

    Every call raises the errors of `protos.errors`: `InvalidRequest` naming the field, `Overloaded` saying when to
    come back, `Unauthenticated` where a tenant's API key is wanted, `WorkerLost` where nothing answers at the
    endpoint, `DeadlineExceeded`, and so on.
    """

    def __init__(self, endpoint: str = DEFAULT_ENDPOINT, *, api_key: str = "") -> None:
        """`api_key`: a tenant's, where the cluster has tenants. It is sent in clear, like all the rest."""
        self.endpoint = endpoint
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._channel = grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def close(self) -> None:
        """Cancel what runs and hang up."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        deadline_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the answer to exactly one of `text`, chat `messages` and `token_ids`.

        Without `deadline_s` the router's default holds. Closing the generator, or cancelling the task that reads it,
        cancels the request and frees all that it held.
        """
        request = inference_pb2.GenerateRequest(
            model=model,
            request_id=request_id,
            sampling=_sampling(sampling),
            **_prompt(text, messages, token_ids),
        )
        call = self._stub.Generate(request, timeout=deadline_s, metadata=self._metadata)
        try:
            async for message in call:
                yield _chunk(message)
        except grpc.aio.AioRpcError as error:
            raise self._typed(error) from error
        finally:
            call.cancel()

    async def complete(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        deadline_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """The whole answer at once; the arguments are those of `generate`."""
        stream = self.generate(
            text,
            messages=messages,
            token_ids=token_ids,
            model=model,
            deadline_s=deadline_s,
            request_id=request_id,
            **sampling,
        )
        return _join([chunk async for chunk in stream])

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        model: str = "",
        deadline_s: float | None = 30.0,
    ) -> list[int]:
        """The token ids of `text`, or of chat `messages` in the model's template."""
        request = inference_pb2.TokenizeRequest(model=model, **_prompt(text, messages, None))
        try:
            response = await self._stub.Tokenize(request, timeout=deadline_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._typed(error) from error
        return list(response.token_ids)

    async def list_models(self, *, deadline_s: float | None = 30.0) -> list[inference_pb2.Model]:
        """The models that are served: id, context length, vocabulary size."""
        try:
            request = inference_pb2.ListModelsRequest()
            response = await self._stub.ListModels(request, timeout=deadline_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._typed(error) from error
        return list(response.models)

    def _typed(self, error: grpc.aio.AioRpcError) -> errors.DiptychError:
        said = any(key == status.DETAIL_KEY for key, _ in error.trailing_metadata() or ())
        if error.code() is grpc.StatusCode.UNAVAILABLE and not said:  # grpc's own words
            return errors.WorkerLost(f"no router answers at {self.endpoint}: {error.details()}", stage="connect")
        return status.from_rpc_error(error)


def _sampling(options: Sampling) -> common_pb2.SamplingParams:
    fields: dict[str, Any] = dict(options)
    try:
        if "bad_tokens" in fields:
            fields["bad_tokens"] = [common_pb2.TokenSequence(ids=run) for run in fields["bad_tokens"]]
        return common_pb2.SamplingParams(**fields)
    except (TypeError, ValueError) as error:
        raise errors.InvalidRequest(f"sampling: {error}", field="sampling") from error


def _prompt(text: str | None, messages: Sequence[Message] | None, token_ids: Iterable[int] | None) -> dict[str, Any]:
    """The one field of the `prompt` oneof. Emptiness is the router's to judge."""
    given = [value for value in (text, messages, token_ids) if value is not None]
    if len(given) != 1:
        raise errors.InvalidRequest("give exactly one of text, messages and token_ids", field="prompt")
    try:
        if text is not None:
            text.encode()  # a lone surrogate is refused here, by name
            return {"text": text}
        if messages is not None:
            chat = [inference_pb2.ChatMessage(**message) for message in messages]
            return {"chat": inference_pb2.ChatPrompt(messages=chat)}
        return {"tokens": inference_pb2.TokenIds(ids=token_ids)}
    except (TypeError, ValueError) as error:
        raise errors.InvalidRequest(f"prompt: {error}", field="prompt") from error


def _chunk(message: inference_pb2.GenerateResponse) -> Chunk:
    return Chunk(
        request_id=message.request_id,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs),
        prompt_logprobs=tuple(message.prompt_logprobs),
        finish_reason=_FINISH.get(message.finish_reason),
        usage=message.usage if message.HasField("usage") else None,
        stats=message.stats if message.HasField("stats") else None,
    )


def _join(chunks: Sequence[Chunk]) -> Completion:
    last = chunks[-1] if chunks else None
    if last is None or last.finish_reason is None or last.usage is None or last.stats is None:
        raise errors.DiptychError("the router ended the stream before the answer", stage="stream")
    return Completion(
        request_id=last.request_id,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(id_ for chunk in chunks for id_ in chunk.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        stats=last.stats,
        logprobs=tuple(found for chunk in chunks for found in chunk.logprobs),
        prompt_logprobs=tuple(found for chunk in chunks for found in chunk.prompt_logprobs),
    )

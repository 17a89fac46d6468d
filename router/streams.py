"""From a request's life to its client: what the client has not yet taken is merged into one message."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from protos import errors
from protos.v1 import common_pb2, inference_pb2

PROMPT_TOKENS = 4096  # whose log-probabilities go into one message: 20 each are 0.7 MB


@dataclass(frozen=True)
class Summary:
    """What the last message says."""

    reason: common_pb2.FinishReason
    usage: inference_pb2.Usage
    stats: inference_pb2.RequestStats


class TokenStream:
    """One request's answer on its way to the client.

    `push` never waits: a client that reads slowly finds several tokens in its next message. What waits here is at
    most one answer, so the request's own `max_tokens` bounds the memory.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[common_pb2.TokenLogprobs] = []
        self._prompt_logprobs: list[common_pb2.TokenLogprobs] = []
        self._end: Summary | errors.DiptychError | None = None
        self._wake = asyncio.Event()
        self._closed = asyncio.Event()

    def push(self, token_ids: list[int], text: str, logprobs: Sequence[common_pb2.TokenLogprobs] = ()) -> None:
        """Add tokens, the text that became whole with them, and their log-probabilities where they are wanted."""
        self._ids += token_ids
        self._text.append(text)
        self._logprobs += logprobs
        self._wake.set()

    def push_prompt(self, logprobs: Sequence[common_pb2.TokenLogprobs]) -> None:
        """Add log-probabilities of the prompt's tokens, before any token of the answer."""
        self._prompt_logprobs += logprobs
        self._wake.set()

    def finish(self, summary: Summary) -> None:
        """End well: what is still pending becomes the last message."""
        self._end = summary
        self._wake.set()

    def fail(self, error: errors.DiptychError) -> None:
        """End with an error, after what is still pending. Does nothing after another end."""
        self._end = self._end or error
        self._wake.set()

    async def messages(self) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """What the client is sent, to the end. Raises the error that `fail` was given."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while len(self._prompt_logprobs) > PROMPT_TOKENS:
                yield self._take_prompt()
            end, message = self._end, self._take()
            if isinstance(end, Summary):
                message.finish_reason = end.reason
                message.usage.CopyFrom(end.usage)
                message.stats.CopyFrom(end.stats)
            if message.token_ids or message.text or isinstance(end, Summary):
                yield message
            if isinstance(end, errors.DiptychError):
                raise end
            if end is not None:
                return

    def close(self) -> None:
        """Say that nothing more is sent: the client has all of it, or is gone."""
        self._closed.set()

    async def closed(self) -> None:
        """Wait for `close`."""
        await self._closed.wait()

    def _take(self) -> inference_pb2.GenerateResponse:
        message = self._take_prompt()
        message.token_ids.extend(self._ids)
        message.text = "".join(self._text)
        message.logprobs.extend(self._logprobs)
        self._ids, self._text, self._logprobs = [], [], []
        return message

    def _take_prompt(self) -> inference_pb2.GenerateResponse:
        part = self._prompt_logprobs[:PROMPT_TOKENS]
        del self._prompt_logprobs[:PROMPT_TOKENS]
        return inference_pb2.GenerateResponse(request_id=self.request_id, prompt_logprobs=part)

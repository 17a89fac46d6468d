"""A prompt out of a message: checked first, then turned into token ids off the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from protos.errors import InvalidRequest
from protos.v1 import inference_pb2
from router.served_model import ServedModel

ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 4096
# Shorter text is tokenized on the loop: that takes less than a visit to another thread.
INLINE_BYTES = 2048

Message = inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest


class PromptReader:
    """Owns the threads that tokenize long text. Who calls bounds how many prompts are read at once."""

    def __init__(self, model: ServedModel, max_bytes: int) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")

    def close(self) -> None:
        """Let the threads go; what they are doing is finished and thrown away."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def read(self, message: Message) -> list[int]:
        """The prompt's token ids, at least one.

        Raises `InvalidRequest` naming the field.
        """
        kind = message.WhichOneof("prompt")
        if kind == "text":
            ids = await self._encode_text(message.text)
        elif kind == "chat":
            ids = await self._encode_chat(message.chat)
        elif kind == "tokens":
            ids = self._check_ids(cast(inference_pb2.GenerateRequest, message).tokens)
        else:
            raise InvalidRequest("there is no prompt: set one of text, chat or tokens", field="prompt")
        if not ids:
            raise InvalidRequest("the prompt is empty", field=kind)
        return ids

    async def _encode_text(self, text: str) -> list[int]:
        size = self._measure([text], "text")
        tokenizer = self._model.tokenizer
        if size <= INLINE_BYTES:
            return tokenizer.encode(text)
        return await asyncio.get_running_loop().run_in_executor(self._threads, tokenizer.encode, text)

    async def _encode_chat(self, chat: inference_pb2.ChatPrompt) -> list[int]:
        if not chat.messages:
            raise InvalidRequest("the chat has no message", field="chat")
        if len(chat.messages) > MAX_MESSAGES:
            raise InvalidRequest(
                f"{len(chat.messages)} messages are more than the {MAX_MESSAGES} that are taken", field="chat"
            )
        for index, message in enumerate(chat.messages):
            if message.role not in ROLES:
                raise InvalidRequest(
                    f"{message.role[:40]!r} is no role: use one of {', '.join(ROLES)}",
                    field=f"chat.messages[{index}].role",
                )
        size = self._measure([message.content for message in chat.messages], "chat")
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        if size <= INLINE_BYTES:
            return self._model.tokenizer.apply_chat(messages)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._model.tokenizer.apply_chat, messages)

    def _measure(self, texts: list[str], field: str) -> int:
        """Bytes of all texts; refused above the limit. Characters are counted first, for that costs nothing."""
        size = sum(map(len, texts))
        if size <= self._max_bytes:
            size = sum(len(text.encode()) for text in texts)
        if size > self._max_bytes:
            raise InvalidRequest(
                f"{size} bytes of text are more than the {self._max_bytes} that are taken", field=field
            )
        return size

    def _check_ids(self, tokens: inference_pb2.TokenIds) -> list[int]:
        config = self._model.config
        if len(tokens.ids) > config.max_positions:
            raise InvalidRequest(
                f"{len(tokens.ids)} tokens are more than the model's context of {config.max_positions}", field="prompt"
            )
        ids = list(tokens.ids)
        if ids and max(ids) >= config.vocab:
            at = next(index for index, token in enumerate(ids) if token >= config.vocab)
            raise InvalidRequest(
                f"id {ids[at]} at index {at} is not below {config.vocab}, the size of the vocabulary", field="tokens"
            )
        return ids

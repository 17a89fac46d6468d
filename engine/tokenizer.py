"""Text and chat messages to token ids, and ids to bytes. No torch: the router uses it."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from engine.chat_template import ChatTemplate
from engine.json_fields import read_json
from engine.model_config import eos_token_ids
from protos.errors import InvalidRequest, ModelUnusable

# One text at a time has nothing to share out, and the library's threads would only warn about later forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """A model's tokenizer.json, with its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: ChatTemplate | None,
        eos_token_ids: tuple[int, ...],
        fingerprint: str,
    ) -> None:
        """Raises `ModelUnusable` where it is not known how the tokenizer's ids become bytes."""
        self._backend = backend
        self._template = template
        self._byte_level, self.strips_first_space = _decoding(backend)
        self._special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self.eos_token_ids = eos_token_ids
        self.fingerprint = fingerprint  # equal for two tokenizers exactly when their files are
        self.vocab_size = backend.get_vocab_size()

    @classmethod
    def from_dir(cls, path: Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and the chat template. Raises `ModelUnusable`."""
        file = path / "tokenizer.json"
        try:
            data = file.read_bytes()
            backend = tokenizers.Tokenizer.from_str(data.decode())
        except FileNotFoundError as error:
            raise ModelUnusable(f"{file} is missing: fetch the model's files again", stage="load") from error
        except Exception as error:  # the library raises bare Exceptions
            raise ModelUnusable(
                f"{file} cannot be read ({error}): fetch the model's files again", stage="load"
            ) from error
        settings_file = path / "tokenizer_config.json"
        settings = read_json(settings_file) if settings_file.exists() else {}
        fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()
        return cls(backend, ChatTemplate.from_dir(path, settings), eos_token_ids(path), fingerprint)

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt, with what the model wants before it (a begin-of-sequence id, for some)."""
        return self._encode(text, add_special_tokens=True)

    def encode_part(self, text: str) -> list[int]:
        """Ids of a piece of text, with nothing before it."""
        return self._encode(text, add_special_tokens=False)

    def apply_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation up to the point where the assistant speaks next.

        A message has a `role` and a `content`. Raises `InvalidRequest` where the model has no chat template or the
        template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template: send text instead", field="chat")
        return self._encode(self._template.render(messages), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_first_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """What one id adds to the text, in UTF-8; nothing for a special or an unknown id."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._bytes_of(token_id)
        return known

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            # Not `encode`: that one holds the interpreter's lock, for seconds where the text has megabytes.
            encodings = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:  # a lone surrogate
            raise InvalidRequest("the text is not valid Unicode", field="text") from error
        return list(encodings[0].ids)

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None or token_id in self._special:
            return b""
        if not self._byte_level:
            as_byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            return bytes.fromhex(as_byte[1]) if as_byte else token.replace("▁", " ").encode()
        try:
            return bytes([_BYTE_OF_CHAR[char] for char in token])
        except KeyError:  # an added token: plain text
            return token.encode()


def _decoding(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """(whether a token's characters stand for bytes, whether the text loses its first space).

    Two families are known: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece (Llama 2, Mistral).
    """
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    if set(steps) == {"ByteLevel"}:
        return True, False
    if {"Replace", "ByteFallback"} <= set(steps) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return False, steps.get("Strip", {}).get("start", 0) == 1
    raise ModelUnusable(
        f"the model's tokenizer decodes by {'+'.join(steps)}, which is not built: choose a model with a byte-level BPE "
        "or a SentencePiece tokenizer",
        stage="load",
    )


def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()

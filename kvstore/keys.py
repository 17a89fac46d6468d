"""Page identity: a chain of hashes, the same in every process, not guessable across tenants.

    root  = BLAKE2b-128(key = tenant secret, model fingerprint | format | rope | tokenizer)
    key_i = BLAKE2b-128(key_{i-1} | token ids of page i)

So a key names the page's tokens and everything before them. Only full pages have one.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NewType

from kvstore.page_format import PageFormat

PageKey = NewType("PageKey", bytes)  # 16 bytes

KEY_BYTES = 16
TOKEN_BYTES = 4  # little-endian uint32


def root_key(
    *,
    tenant_secret: str,
    fingerprint: str,
    format: PageFormat,  # noqa: A002
    rope: str,
    tokenizer: str,
) -> PageKey:
    """The key that stands before a prompt's first page: all that makes equal tokens give equal pages."""
    shape = f"{format.layers},{format.kv_heads},{format.page_size},{format.head_dim}"
    fields = (fingerprint, format.dtype, shape, rope, tokenizer)
    # BLAKE2b takes at most 64 bytes of key: hash the secret down, so that one of any length counts in full.
    secret = blake2b(tenant_secret.encode()).digest()
    root = blake2b(key=secret, digest_size=KEY_BYTES)
    for part in (field.encode() for field in fields):
        # Each field is preceded by its length, so that no two sets of fields read the same.
        root.update(len(part).to_bytes(8, "little") + part)
    return PageKey(root.digest())


def next_key(previous: PageKey, token_bytes: bytes | memoryview) -> PageKey:
    """The key of the page that holds `token_bytes` and follows the page (or root) `previous`."""
    key = blake2b(previous, digest_size=KEY_BYTES)
    key.update(token_bytes)
    return PageKey(key.digest())


def page_keys(root: PageKey, token_ids: Sequence[int] | bytes, page_size: int) -> list[PageKey]:
    """The keys of the full pages of a prompt, in order; `token_ids` as ints or as little-endian uint32 bytes.

    Raises `ValueError` for ids outside uint32, or bytes that are no whole number of ids.
    """
    data = memoryview(token_ids if isinstance(token_ids, bytes) else pack_tokens(token_ids))
    if len(data) % TOKEN_BYTES:
        raise ValueError(f"token_ids are {len(data)} bytes, which is no multiple of {TOKEN_BYTES}")
    step = page_size * TOKEN_BYTES
    keys: list[PageKey] = []
    key = root
    for start in range(0, len(data) - step + 1, step):
        key = next_key(key, data[start : start + step])
        keys.append(key)
    return keys


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32 bytes; `ValueError` for an id outside uint32."""
    try:
        packed = array("I", token_ids)
    except OverflowError as error:
        raise ValueError(f"a token id is outside uint32: {error}") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The reverse of `pack_tokens`; `ValueError` where `data` is no whole number of ids."""
    if len(data) % TOKEN_BYTES:
        raise ValueError(f"token_ids are {len(data)} bytes, which is no multiple of {TOKEN_BYTES}")
    tokens = array("I", data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()


def pack_keys(keys: Iterable[PageKey]) -> bytes:
    """Keys end to end, as they travel in messages and to Redis."""
    return b"".join(keys)


def unpack_keys(data: bytes) -> list[PageKey]:
    """The reverse of `pack_keys`; `ValueError` where `data` is no whole number of keys."""
    if len(data) % KEY_BYTES:
        raise ValueError(f"page keys are {len(data)} bytes, which is no multiple of {KEY_BYTES}")
    return [PageKey(data[start : start + KEY_BYTES]) for start in range(0, len(data), KEY_BYTES)]

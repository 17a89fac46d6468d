"""Replays a trace of prompts through the page pool: what a pool of some size would have reused."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from kvstore.eviction import LeastRecentlyUsed
from kvstore.keys import KEY_BYTES, PageKey
from kvstore.pool import OutOfPages, PagePool
from kvstore.reuse_rate import ReuseRate
from protos.errors import InvalidRequest

_MOST_BLOCKS = 1 << 20  # of one prompt


@dataclass(frozen=True)
class Replay:
    """What a replay gave. A hit is a block of a prompt's leading run that the pool still holds."""

    policy: str
    pages: int
    requests: int
    blocks: int
    hits: int
    hit_rate: float
    too_long: int  # requests of more blocks than the pool has pages: nothing of them was found or kept

    def as_dict(self) -> dict[str, str | int | float]:
        return asdict(self)


def read_trace(path: Path) -> Iterator[list[PageKey]]:
    """The prompts of a trace in Mooncake's format: JSON lines (gzipped where the name ends in .gz) with `hash_ids`.

    Each id is a whole number that names a block and all before it; a block counts as a page. Raises `InvalidRequest`
    that names the line at fault.
    """
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    yield [PageKey(block.to_bytes(KEY_BYTES, "little")) for block in _blocks(line)]
    except (ValueError, OverflowError, OSError, EOFError, zlib.error) as error:
        raise InvalidRequest(f"{path}, after line {number}: {error}", field="trace") from error


def replay(prompts: Iterable[list[PageKey]], pages: int, policy: Literal["lru", "reuse"]) -> Replay:
    """Send the prompts, in order, through a pool of so many pages.

    Each prompt finds its leading run, computes the rest, and lets all its pages go before the next one comes, as in a
    worker: the tail first.
    """
    pool = PagePool(pages, policy=LeastRecentlyUsed() if policy == "lru" else ReuseRate(pages))
    requests = blocks = hits = too_long = 0
    for keys in prompts:
        requests += 1
        blocks += len(keys)
        try:
            found = serve(pool, keys)
        except OutOfPages:
            too_long += 1
        else:
            hits += found
    return Replay(policy, pages, requests, blocks, hits, hits / max(blocks, 1), too_long)


def serve(pool: PagePool, keys: list[PageKey]) -> int:
    """One prompt's life in a pool; returns how many of its pages were found. Raises `OutOfPages`."""
    pages, credit = pool.admit(keys, len(keys))
    found = len(pages)
    for key in keys[found:]:
        page = credit.take()
        pool.begin_fill(page)
        pool.seal(page, key)
        pages.append(page)
    pool.release(reversed(pages))
    return found


def _blocks(line: str) -> list[int]:
    request = json.loads(line)
    blocks = request.get("hash_ids") if isinstance(request, dict) else None
    if not isinstance(blocks, list) or not all(type(block) is int and block >= 0 for block in blocks):
        raise ValueError("hash_ids must be a list of whole numbers")
    if len(blocks) > _MOST_BLOCKS:
        raise ValueError(f"{len(blocks)} blocks in one prompt")
    return blocks

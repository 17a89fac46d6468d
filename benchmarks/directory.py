"""The directory's answers and the pool's bookkeeping: what a request waits for before anything is computed.

    python -m benchmarks.directory

Lookups go through the router's own reader to the Valkey that a local cluster starts, two workers holding every page;
`ping` beside them is the plainest call there is. The pool's figure counts pages that went the whole round: promised,
taken, filled, sealed, let go and evicted for the next, prompts of 100 pages, in seconds of this process's CPU time. Its
generations are those of a worker's segment.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from itertools import count
from statistics import median
from typing import Any

from benchmarks.record import write_result
from kvstore.eviction import LeastRecentlyUsed
from kvstore.keys import KEY_BYTES, PageKey
from kvstore.page_format import PageFormat
from kvstore.pool import PagePool
from kvstore.redis_directory import RedisDirectoryReader, RedisDirectoryWriter
from kvstore.replay import serve
from kvstore.reuse_rate import ReuseRate
from kvstore.segment import Segment
from kvstore.valkey import EmbeddedValkey

KEYS = 1000
CALLS = 500  # of each kind in a run, turn by turn
PROMPT = 100  # pages
FORMAT = PageFormat(layers=1, kv_heads=1, page_size=1, head_dim=1, dtype="float32")


async def lookups(url: str) -> dict[str, float]:
    """Median milliseconds of each kind of call."""
    reader, writer = RedisDirectoryReader(url, "bench"), RedisDirectoryWriter(url, "bench")
    held, missing = ([PageKey(os.urandom(KEY_BYTES)) for _ in range(KEYS)] for _ in range(2))
    for holder in ("prefill/1", "decode/2"):
        writer.publish(holder, held[0], held)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "lookup_held_ms": lambda: reader.lookup(held),
        "lookup_miss_ms": lambda: reader.lookup(missing),
        "ping_ms": reader.ping,
    }
    assert await reader.lookup(held) == {"prefill/1": KEYS, "decode/2": KEYS}
    assert await reader.lookup(missing) == {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(CALLS):
        for name, call in calls.items():
            began = time.perf_counter()
            await call()
            times[name].append((time.perf_counter() - began) * 1e3)
    await reader.aclose()
    writer.close()
    return {name: round(median(values), 3) for name, values in times.items()}


def turnover(pages: int, policy: str, rounds: int) -> float:
    """Pages a second through a full pool."""
    segment = Segment.create(FORMAT, pages, incarnation=1)
    chosen = LeastRecentlyUsed() if policy == "lru" else ReuseRate(pages)
    pool = PagePool(pages, segment.generations.data, policy=chosen)
    numbers = count()

    def prompt() -> list[PageKey]:
        return [PageKey(next(numbers).to_bytes(KEY_BYTES, "little")) for _ in range(PROMPT)]

    while pool.available_pages and len(pool._free) >= PROMPT:
        serve(pool, prompt())
    prompts = [prompt() for _ in range(rounds)]
    began = time.process_time()
    for keys in prompts:
        serve(pool, keys)
    took = time.process_time() - began
    segment.close()
    return rounds * PROMPT / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    directory: dict[str, list[dict[str, float]]] = {"unix": [], "tcp": []}
    with EmbeddedValkey() as unix, EmbeddedValkey("127.0.0.1") as tcp:
        for _ in range(arguments.runs):
            directory["unix"].append(asyncio.run(lookups(unix.url)))
            directory["tcp"].append(asyncio.run(lookups(tcp.url)))
    pools = []
    for pages in arguments.pages:
        for policy in ("lru", "reuse"):
            rates = [round(turnover(pages, policy, rounds=1000)) for _ in range(arguments.runs)]
            pools.append({"pages": pages, "policy": policy, "pages_per_s": round(median(rates)), "runs": rates})
            print(pools[-1], flush=True)
    result = {
        "load_average": os.getloadavg(),
        "keys": KEYS,
        "directory": {
            over: {name: median(run[name] for run in runs) for name in runs[0]} | {"runs": runs}
            for over, runs in directory.items()
        },
        "pool": pools,
    }
    for over in directory:
        print(over, {name: value for name, value in result["directory"][over].items() if name != "runs"})
    print(write_result("directory", result))


if __name__ == "__main__":
    main()

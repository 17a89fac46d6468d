"""Eviction policies on a trace of prompts, by the pool's size: python -m benchmarks.replay TRACE [--pages N ...]

The trace is JSON lines (.gz too) with `hash_ids`, as Mooncake publishes them; a block counts as a page.
"""

import argparse
from pathlib import Path

from benchmarks.record import write_result
from kvstore.replay import read_trace, replay

SIZES = (1_000, 3_000, 10_000, 30_000, 50_000, 100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--pages", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    prompts = list(read_trace(arguments.trace))
    rows = [replay(prompts, len(set().union(*prompts)), "lru").as_dict()]
    for pages in arguments.pages:
        rows += [replay(prompts, pages, "lru").as_dict(), replay(prompts, pages, "reuse").as_dict()]
    for row in rows:
        print(f"{row['pages']:>8} {row['policy']:5} {row['hit_rate']:.4f}")
    print(write_result(f"replay_{arguments.trace.name.split('.')[0]}", {"trace": arguments.trace.name, "rows": rows}))


if __name__ == "__main__":
    main()

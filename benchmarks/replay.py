"""Eviction policies on a load of prompts, by the pool's size, beside what no policy can beat.

    python -m benchmarks.replay TRACE         JSON lines (.gz too) with `hash_ids`, as Mooncake publishes them
    python -m benchmarks.replay agents        the load of benchmarks/agent_load.py
    python -m benchmarks.replay agents_and_documents

A block counts as a page.
"""

import argparse
from pathlib import Path

from benchmarks.agent_load import agent_prompts
from benchmarks.belady import belady_hits
from benchmarks.record import write_result
from kvstore.replay import read_trace, replay

SIZES = (1_000, 3_000, 10_000, 30_000, 50_000, 100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load")
    parser.add_argument("--pages", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    name = Path(arguments.load).name.split(".")[0]
    if name in ("agents", "agents_and_documents"):
        prompts = agent_prompts(documents=name != "agents")
    else:
        prompts = list(read_trace(Path(arguments.load)))
    rows = [replay(prompts, len(set().union(*prompts)), "lru").as_dict()]
    for pages in arguments.pages:
        rows += [replay(prompts, pages, "lru").as_dict(), replay(prompts, pages, "reuse").as_dict()]
        hits = belady_hits(prompts, pages)
        rows.append(rows[-1] | {"policy": "belady", "hits": hits, "hit_rate": hits / sum(map(len, prompts))})
    for row in rows:
        print(f"{row['pages']:>8} {row['policy']:6} {row['hit_rate']:.4f}")
    print(write_result(f"replay_{name}", {"load": name, "rows": rows}))


if __name__ == "__main__":
    main()

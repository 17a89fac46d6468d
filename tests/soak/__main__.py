"""`python -m soak --minutes 20`: writes benchmarks/results/soak.json; ends with 1 where something is that must not be.

`--planted-bug fence` takes the comparison of generations out of the workers: then the run must find wrong tokens, and
ends as soon as it has.
"""

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write_result
from soak.cases import make_cases
from soak.chaos import Chaos
from soak.load import ABORTS, CLIENTS, Load
from soak.tally import Tally
from soak.town import POOLS, Town
from tiny_model import make_tiny_model

ROUND_S = 60.0  # of load and faults; then all is healed, and nothing may be held


async def main(options: argparse.Namespace) -> int:
    folder = Path(tempfile.mkdtemp(prefix="diptych-soak-"))
    print(f"logs: {folder}; the run can be drawn again by --seed {options.seed}", flush=True)
    model = make_tiny_model(folder / "model")
    rng = random.Random(options.seed)
    cases = await asyncio.to_thread(make_cases, model, options.seed)
    async with Town(model, folder, options.planted_bug) as town:
        result = await _run(town, cases, rng, options)
    musts = result["musts"]
    path = write_result(options.name, result)
    print(f"{path}: {musts}", flush=True)
    if not all(musts.values()):
        return 1
    shutil.rmtree(folder)
    return 0


async def _run(town: Town, cases: list, rng: random.Random, options: argparse.Namespace) -> dict[str, Any]:
    tally, leaked = Tally(), []
    load, chaos = Load(town, cases, tally, rng), Chaos(town, rng)
    started = time.monotonic()
    end, rounds = started + 60 * options.minutes, 0
    while time.monotonic() < end and not (options.planted_bug and tally.wrong):
        load.start()
        chaos.start()
        await _wait(min(end, time.monotonic() + ROUND_S), tally, stop_at_wrong=bool(options.planted_bug))
        await chaos.stop()
        await load.stop()
        await town.ready()
        leaked.append(await town.leaked())
        rounds += 1
        _tell(started, tally, chaos, leaked)
    return _result(options, time.monotonic() - started, rounds, town, tally, chaos, leaked)


async def _wait(until: float, tally: Tally, stop_at_wrong: bool) -> None:
    while time.monotonic() < until and not (stop_at_wrong and tally.wrong):
        await asyncio.sleep(0.2)


def _tell(started: float, tally: Tally, chaos: Chaos, leaked: list[dict[str, int]]) -> None:
    print(
        f"{time.monotonic() - started:6.0f} s  {tally.requests} requests, {tally.outcomes['answered']} answered, "
        f"{len(tally.wrong)} wrong, {tally.outcomes['late']} late, {tally.outcomes['aborted']} aborted, "
        f"{tally.placed_again} placed again, {chaos.done.total()} faults, leaked {leaked[-1] or 'nothing'}",
        flush=True,
    )
    for stuck in tally.stuck[-3:]:
        print(f"          its whole deadline spent: {stuck}", flush=True)
    for wrong in tally.wrong[:3]:
        print(f"          wrong: {wrong}", flush=True)


def _result(
    options: argparse.Namespace,
    seconds: float,
    rounds: int,
    town: Town,
    tally: Tally,
    chaos: Chaos,
    leaked: list[dict[str, int]],
) -> dict[str, Any]:
    crashes = {slot.kind: slot.crashes for slot in town.slots if slot.crashes}
    leaks = [round_leaks for round_leaks in leaked if round_leaks]
    clean = {
        "no wrong tokens": not tally.wrong,
        "no leaked pages": not leaks,
        "no request past its deadline without an answer": not tally.outcomes["late"],
        "every error typed": not tally.untyped,
        "no process ended by itself": not crashes,
    }
    return {
        "seed": options.seed,
        "planted_bug": options.planted_bug,
        "duration_s": round(seconds, 1),
        "rounds": rounds,
        "processes": POOLS | {"valkey": 1},
        "clients": CLIENTS,
        "share_of_requests_with_an_impatient_client": ABORTS,
        "requests": tally.requests,
        "answered": tally.outcomes["answered"],
        "tokens_compared": tally.tokens,
        "wrong_answers": len(tally.wrong),
        "wrong_examples": tally.wrong[:3],
        "leaked_pages": sum(sum(held.values()) for held in leaks),
        "late_requests": tally.outcomes["late"],
        "whole_deadline_spent": tally.stuck[:20],
        "placed_again": tally.placed_again,
        "outcomes": dict(tally.outcomes.most_common()),
        "paths": dict(tally.reached) | {f"pages by {name}": count for name, count in tally.transports.items()},
        "faults": dict(sorted(chaos.done.items())),
        "starts_that_were_tried_again": sum(len(slot.refusals) for slot in town.slots),
        "crashes": crashes,
        "musts": {"the planted bug is caught": bool(tally.wrong)} if options.planted_bug else clean,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--planted-bug", choices=["fence"], default="")
    parser.add_argument("--name", default="soak", help="of the result under benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(_options())))

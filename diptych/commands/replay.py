"""`diptych replay`: what a pool of some size would have reused of a trace of prompts."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import track

from protos.errors import InvalidRequest


def replay(
    trace: Annotated[Path, typer.Argument(help="JSON lines (.gz too), one prompt a line: its hash_ids.")],
    pages: Annotated[int, typer.Option(min=0, help="Pages of the pool; 0: room for the whole trace.")],
    policy: Annotated[Literal["lru", "reuse"], typer.Option(help="What leaves a full pool first.")] = "reuse",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay a trace of page hashes through the page pool, without a model, and print the share of hits."""
    from kvstore.replay import read_trace
    from kvstore.replay import replay as run

    if not trace.is_file():
        raise InvalidRequest(f"there is no file {trace}", field="trace")
    console = Console(stderr=True)
    prompts = list(read_trace(trace))
    shown = track(prompts, "replaying", console=console, disable=not console.is_terminal)
    result = run(shown, pages or len(set().union(*prompts)), policy).as_dict()
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name.replace('_', ' '):9} {value:.4f}" if isinstance(value, float) else f"{name:9} {value}")

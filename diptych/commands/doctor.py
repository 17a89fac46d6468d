"""`diptych doctor`."""

import json as jsonlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from diptych.commands.options import DEFAULT_NAME, Name, Operator, operator_of
from diptych.exit_codes import SETUP
from diptych.phases import Phases
from protos import errors

if TYPE_CHECKING:
    from cluster.doctor import Path


def doctor(
    name: Name = DEFAULT_NAME,
    operator: Operator = "",
    json: Annotated[bool, typer.Option("--json", help="One object for each path.")] = False,
) -> None:
    """Measure how KV pages move between workers and page stores, and name what is slower than it should be.

    Exit code 3 where a path does not work or is slow.
    """
    from cluster.doctor import flag_slow, measure, paths_of
    from cluster.operator_client import OperatorClient

    with OperatorClient(operator_of(name, operator)) as client:
        cluster = client.status()
    pairs = paths_of(cluster)
    if not pairs:
        raise errors.NoWorkers("no two are ready between which pages move", stage="doctor")
    paths = []
    with Phases(Console(stderr=True)) as phases:
        for source, reader in pairs:
            phases.show("measuring", f"{source.id} to {reader.id}")
            paths.append(measure(source, reader))
    paths = flag_slow(paths)
    if json:
        print(jsonlib.dumps([asdict(path) for path in paths], indent=2))
    else:
        Console().print(_table(paths))
    if any(path.slow or path.error for path in paths):
        raise typer.Exit(SETUP)


def _table(paths: "list[Path]") -> Table:
    names = ["from", "to", "tier", "by", "GB/s", "of MiB", "one page"]
    table = Table(*(Column(name, no_wrap=True) for name in names), "", box=None)
    for path in paths:
        if path.error:
            table.add_row(path.source, path.reader, path.tier, "[red]none[/red]", "", "", "", escape(path.error))
            continue
        figures = [f"{path.gb_per_s:.2f}", f"{path.pull_mib:.0f}", f"{path.page_ms:.2f} ms"]
        verdict = f"[yellow]slower than expected[/yellow]: {escape(path.slow)}" if path.slow else "[green]ok[/green]"
        table.add_row(path.source, path.reader, path.tier, path.transport, *figures, verdict)
    return table

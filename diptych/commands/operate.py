"""`diptych status` and `diptych scale`."""

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from diptych.commands.options import DEFAULT_NAME, Name, Operator, operator_of
from diptych.phases import Phases
from protos import errors

if TYPE_CHECKING:
    from protos.v1 import operator_pb2


def status(
    name: Name = DEFAULT_NAME,
    operator: Operator = "",
    json: Annotated[bool, typer.Option("--json", help="The operator's StatusResponse as JSON.")] = False,
) -> None:
    """Show what runs, where, and how busy it is."""
    from cluster.operator_client import OperatorClient

    with OperatorClient(operator_of(name, operator)) as client:
        cluster = client.status()
    if json:
        from google.protobuf.json_format import MessageToJson

        text = MessageToJson(cluster, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        print(text)
        return
    console = Console()
    console.print(_head(cluster), highlight=False, soft_wrap=True)
    console.print(_workers(cluster))


def _head(cluster: "operator_pb2.StatusResponse") -> str:
    ready = "[green]ready[/green]" if cluster.ready else "[yellow]not ready[/yellow]"
    redis = "answers" if cluster.redis_alive else "[red]does not answer[/red]"
    return (
        f"{ready}  model {cluster.model}  version {cluster.version}\n"
        f"router {', '.join(cluster.routers) or 'none'}\n"
        f"metadata {cluster.redis} {redis}"
    )


def _workers(cluster: "operator_pb2.StatusResponse") -> Table:
    from protos.v1 import operator_pb2

    several_nodes = len({worker.node for pool in cluster.pools for worker in pool.workers if worker.node}) > 1
    names = ["worker", "state", "address", *(["node"] if several_nodes else []), "running", "waiting", "pages"]
    table = Table(*(Column(name, no_wrap=True) for name in names), "", box=None)
    for pool in cluster.pools:
        table.add_row(f"[bold]{pool.pool}[/bold]", f"{pool.desired} desired")
        for worker in pool.workers:
            load = worker.load
            state = operator_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
            node = [worker.node] if several_nodes else []
            counts = [str(load.running), str(load.waiting), f"{load.held_pages}/{load.total_pages}"]
            if not load.total_pages:
                counts = ["", "", ""]
            note = escape(worker.message or worker.device)
            table.add_row(f"  {worker.worker_id}", state, worker.address, *node, *counts, note)
    return table


def scale(
    sizes: Annotated[list[str], typer.Argument(help="POOL=N, such as prefill=2 decode=3.")],
    name: Name = DEFAULT_NAME,
    operator: Operator = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is so, leaving workers included.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait.")] = 900,
) -> None:
    """Set the size of the pools that are named; the others stay. A leaving worker finishes what it has."""
    from cluster.operator_client import OperatorClient
    from cluster.ready import wait_ready

    desired = parse_sizes(sizes)
    endpoint = operator_of(name, operator)
    with OperatorClient(endpoint) as client:
        client.scale(desired)
    if wait:
        with Phases(Console(stderr=True)) as phases:
            wait_ready(endpoint, time.monotonic() + timeout, phases.show)
    print(f"{'scaled to' if wait else 'scaling to'} {' '.join(sizes)}")


def parse_sizes(sizes: list[str]) -> dict[str, int]:
    """`["prefill=2", "decode=3"]` as numbers. Raises `InvalidRequest`."""
    desired: dict[str, int] = {}
    for size in sizes:
        pool, equals, number = size.partition("=")
        if not equals or not number.isascii() or not number.isdigit():
            raise errors.InvalidRequest(f"{size!r}: write POOL=N, such as decode=3", field="sizes")
        if pool in desired:
            raise errors.InvalidRequest(f"{pool} is given twice", field="sizes")
        desired[pool] = int(number)
    return desired

"""Options that several commands share, and finding the cluster that they mean."""

from typing import Annotated

import typer

from protos import errors

Name = Annotated[str, typer.Option("--name", "-n", help="The cluster's name.", envvar="DIPTYCH_CLUSTER")]
Operator = Annotated[str, typer.Option(help="HOST:PORT of a controller, for a cluster that was brought up elsewhere.")]
DEFAULT_NAME = "diptych"


def router_of(name: str) -> str:
    """The router of a cluster that was brought up from this machine. Raises `NoWorkers` where there is none."""
    from cluster.state import StateFile

    state = StateFile(name).read()
    if state is not None and state.router:
        return state.router
    if state is not None and state.operator and not state.error:  # `up` was ended before it could note the router
        from cluster.operator_client import OperatorClient

        with OperatorClient(state.operator) as client:
            routers = client.status().routers
        if routers:
            return routers[0]
    raise errors.NoWorkers(
        f"no cluster {name!r} is up here: run `diptych up`, or say where one is with --endpoint HOST:PORT"
    )


def operator_of(name: str, operator: str) -> str:
    """The controller that commands talk to. Raises `NoWorkers` where there is none, with what ended it."""
    if operator:
        return operator
    from cluster.state import StateFile

    state = StateFile(name).read()
    if state is None or not state.operator:
        raise errors.NoWorkers(
            f"no cluster {name!r} is up here: run `diptych up`, or say where one is with --operator HOST:PORT"
        )
    if state.error:
        raise errors.NoWorkers(f"cluster {name!r} has ended: {state.error}; run `diptych up` again")
    return state.operator

"""Bringing a cluster up on a Ray cluster that an operator runs, and taking it down. No process stays here."""

import time

from cluster.config import ClusterConfig
from cluster.operator_client import OperatorClient
from cluster.ready import Show, wait_ready
from cluster.state import ClusterState, StateFile, is_supervised
from protos import errors


def bring_up(config: ClusterConfig, deadline_s: float, show: Show) -> ClusterState:
    """Create the controller as a detached actor and wait until the cluster is ready; on any error it is ended.

    Raises `FixTheSetup` where Ray, Redis or the model cannot be used, `DeadlineExceeded` after `deadline_s`.
    """
    from cluster import ray_session  # here: Ray takes its time

    file = StateFile(config.name)
    if file.read() is not None or is_supervised(file):
        raise errors.FixTheSetup(
            f"cluster {config.name!r} was brought up from here already: `diptych down` first, or choose another --name",
            stage="up",
        )
    assert config.ray_address is not None
    give_up = time.monotonic() + deadline_s
    show("ray", config.ray_address)
    with ray_session.connected(config.ray_address):
        show("controller", "")
        _, operator = ray_session.start_controller(config, detached=True)
    try:
        router = wait_ready(operator, give_up, show)
    except BaseException:
        show("down", "ending what was started")
        with OperatorClient(operator) as client:
            client.shutdown()
        raise
    state = ClusterState(
        name=config.name,
        phase="ready",
        model=config.model,
        router=router,
        operator=operator,
        ray_address=config.ray_address,
    )
    file.write(state)
    return state


def take_down(file: StateFile, state: ClusterState, show: Show) -> None:
    """Ask the controller to end everything, itself included. Raises `WorkerLost` where it does not answer."""
    show("down", "routers and workers")
    try:
        with OperatorClient(state.operator) as client:
            client.shutdown()
    except errors.WorkerLost as error:
        error.message += f"; if that Ray cluster is gone for good, remove {file.path}"
        raise
    file.remove()

"""Ray as Diptych uses it: a private one for a local cluster, or one that an operator runs."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.config import POOLS, ClusterConfig
from cluster.controller_actor import ControllerActor
from cluster.ray_process import HEAD, explain, unpack
from kvstore.directory import STORE_POOL
from protos import errors

NAMESPACE = "diptych"
# Ray takes 127.0.0.1 for "find another address of this machine"; that of a laptop changes with its network.
_LOOPBACK = "127.0.0.2"
_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # nothing of ours goes through it; less is refused
_SLOTS = 1024  # workers of each pool on this machine
_START_S = 60.0  # for the controller
_DIAL_S = 3.0


def start_local(folder: Path) -> None:
    """Start a Ray of one node that ends with this process; its session goes to `folder`.

    Call it from the main thread: the kernel ends the node when that thread ends. The process needs the environment
    that `cluster.ray_environment` makes.
    """
    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=0,
        resources={**dict.fromkeys(POOLS, _SLOTS), STORE_POOL: 1},
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address=_LOOPBACK,
        _temp_dir=str(folder),
    )


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of an existing Ray cluster for a while. Raises `FixTheSetup` where none answers at `address`."""
    _dial(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray puts the current folder on the import path of every worker: it may hold packages named as ours.
    with contextlib.chdir("/"):
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError, RayError) as error:  # versions that differ, a token missing, ...
            raise errors.FixTheSetup(f"cannot use the Ray cluster at {address}: {error}", stage="ray") from error
    try:
        yield
    finally:
        ray.shutdown()


def start_controller(config: ClusterConfig, *, detached: bool) -> tuple[Any, str]:
    """Start the cluster's controller on Ray's head node; its actor, and the address of its operator service.

    A detached controller outlives this process. Raises the typed error of its start, `FixTheSetup` where the cluster
    is up already.
    """
    options: dict[str, Any] = {"num_cpus": 0, "resources": {HEAD: 0.001}, "max_concurrency": 64}
    if detached:
        options["lifetime"] = "detached"
    actor: Any = ray.remote(ControllerActor).options(name=f"{config.name}-controller", **options)
    try:
        handle = actor.remote(config.model_dump_json())
    except ValueError as error:  # the name is taken
        raise errors.FixTheSetup(
            f"a cluster {config.name!r} is up on this Ray cluster: take it down first, or choose another --name",
            stage="ray",
        ) from error
    try:
        return handle, unpack(ray.get(handle.start.remote(), timeout=_START_S))
    except BaseException as error:
        ray.kill(handle)
        if isinstance(error, GetTimeoutError):
            raise errors.DeadlineExceeded(f"no controller after {_START_S:.0f} s", stage="ray") from error
        if isinstance(error, RayError):
            raise errors.WorkerLost(f"the controller died: {explain(error)}", stage="ray") from error
        raise


def _dial(address: str) -> None:
    """Ray itself tries for a minute."""
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise errors.FixTheSetup(f"--ray-address {address!r}: give HOST:PORT, as `ray start` shows it", stage="ray")
    try:
        socket.create_connection((host, port), timeout=_DIAL_S).close()
    except OSError as error:
        raise errors.FixTheSetup(f"no Ray cluster answers at {address}: {error}", stage="ray") from error

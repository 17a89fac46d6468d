"""The controller as a Ray actor, with the operator's service on a port."""

import asyncio
import logging
from typing import Any

import grpc.aio
import ray

from cluster.actors import Reply, configure_logging, describe_error, node_host
from cluster.config import ClusterConfig
from cluster.controller import Controller
from cluster.gpu_share import gpu_share
from cluster.operator_service import SERVICE, OperatorService
from cluster.ray_process import RayLauncher
from cluster.reconcile import Policy
from cluster.self_test import SelfTest
from kvstore.directory import STORE_POOL
from kvstore.redis_directory import RedisDirectoryReader
from protos.errors import FixTheSetup
from protos.v1 import operator_pb2_grpc
from rpc.server import RpcServer, start_server

log = logging.getLogger(__name__)


class ControllerActor:
    """Owns every worker and router: when its process ends, so do theirs."""

    def __init__(self, settings: str) -> None:
        """`settings` is a `ClusterConfig` as JSON, with the metadata server's URL."""
        configure_logging()
        self._config = ClusterConfig.model_validate_json(settings)
        self._ended = asyncio.Event()  # all that the controller started has ended
        self._closed = asyncio.Event()

    async def start(self) -> Reply:
        """Check the metadata server, listen, begin to reconcile; the operator service's address."""
        try:
            return await self._start(), b""
        except Exception as error:
            return "", describe_error(error)

    async def closed(self) -> None:
        """Returns when the cluster has been shut down. Raises what ended the controller, were it a bug."""
        await self._closed.wait()
        await self._run

    async def exit(self) -> None:
        """End this actor once no call is left in it."""
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    async def _start(self) -> str:
        config = self._config
        directory = RedisDirectoryReader(config.redis or "", config.name)
        try:
            await directory.ping()
            policy = Policy(drain_timeout_s=config.drain_timeout_s)
            nodes = await asyncio.to_thread(ray.cluster_resources)
            launcher = RayLauncher(config, gpu_share(config, nodes.get("GPU", 0)))
            controller = Controller(config, launcher, directory.ping, policy, _stores(config, nodes.get(STORE_POOL, 0)))
            service = OperatorService(controller, self._ended)

            def register(server: grpc.aio.Server) -> None:
                operator_pb2_grpc.add_OperatorServicer_to_server(service, server)

            host = config.host or node_host(config)
            server = await start_server(register, [SERVICE], host, config.operator_port)
        except BaseException:
            await directory.aclose()
            raise
        self._run = asyncio.create_task(self._reconcile(controller, server, directory))
        return server.address

    async def _reconcile(self, controller: Controller, server: RpcServer, directory: RedisDirectoryReader) -> None:
        testing = asyncio.create_task(SelfTest(controller.status).run(), name="self-test")
        try:
            await controller.run()
        finally:
            testing.cancel()
            await asyncio.wait({testing})
            self._ended.set()
            await server.stop()
            await directory.aclose()
            self._closed.set()
            itself: Any = ray.get_runtime_context().current_actor
            itself.exit.remote()


def _stores(config: ClusterConfig, offered: float) -> int:
    """How many page stores there are to be: one wherever a node offers the resource. Raises `FixTheSetup`."""
    if not config.store.host_gib:
        return 0
    if offered < 1:
        raise FixTheSetup(f"host_gib: no node of the Ray cluster offers the resource {STORE_POOL!r}", stage="start")
    return int(offered)

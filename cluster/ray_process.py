"""Workers and routers as Ray actors, behind the controller's seam."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc.aio
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray.exceptions import RayError

from cluster.actors import PageStoreActor, RouterActor, ServiceActor, WorkerActor
from cluster.config import ClusterConfig
from cluster.launcher import Launcher, Place, Process
from kvstore.directory import STORE_POOL
from protos import errors
from protos.v1 import common_pb2, inference_pb2, page_store_pb2_grpc, worker_pb2, worker_pb2_grpc
from rpc import status
from rpc.server import CHANNEL_OPTIONS

HEAD = "node:__internal_head__"  # Ray's own resource of the node that starts a cluster
_SHARE = 0.001  # of it: places something there and leaves room for others
_CONCURRENCY = 64  # calls of one actor at a time; a few of them wait for its end
_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name

T = TypeVar("T")


class RayProcess(Process):
    """One actor, and a channel to the service in it."""

    def __init__(self, actor: Any, pool: str) -> None:
        self._actor = actor
        self._pool = pool
        self._channel: grpc.aio.Channel | None = None

    async def place(self) -> Place:
        return Place(*await _result(self._actor.place.remote()))

    async def why_waiting(self) -> str:
        name = HEAD if self._pool == "router" else self._pool
        total, free = await asyncio.to_thread(_resources)  # they ask Ray's head, and block
        offer = f"Ray's nodes offer {total.get(name, 0):.0f} of {name!r}, {free.get(name, 0):.0f} of it free"
        if name == self._pool and total.get("GPU"):
            offer += f"; {total['GPU']:.0f} GPUs, {free.get('GPU', 0):.2f} of them free"
        return offer

    async def progress(self) -> str:
        return str(await _result(self._actor.progress.remote()))

    async def start(self) -> str:
        return unpack(await _result(self._actor.start.remote()))

    async def device(self) -> str:
        return str(await _result(self._actor.device.remote()))

    async def lost(self) -> str:
        try:
            await self._actor.closed.remote()
        except RayError as error:
            return explain(error)
        return "its process ended"

    async def probe(self, address: str, timeout_s: float) -> worker_pb2.WorkerLoad:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        try:
            return await _load(self._pool, self._channel, timeout_s)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error) from error

    async def drain(self, timeout_s: float) -> None:
        unpack(await _result(self._actor.drain.remote(timeout_s)))

    async def stop(self) -> None:
        await _result(self._actor.stop.remote())

    async def kill(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
        ray.kill(self._actor)


class RayLauncher(Launcher):
    """Places workers and page stores by the custom resource named as their pool, and the router on the head node.

    Each worker asks for `gpu_share` of a GPU. 0: Ray leaves alone which GPUs it sees.
    """

    def __init__(self, config: ClusterConfig, gpu_share: float) -> None:
        self._config = config
        self._gpu_share = gpu_share
        self._settings = config.model_dump_json()

    def launch(self, pool: str, worker_id: str, port: int) -> Process:
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": _CONCURRENCY}
        if pool == "router":
            kind: type[ServiceActor] = RouterActor
            options["resources"] = {HEAD: _SHARE}
        else:
            kind = PageStoreActor if pool == STORE_POOL else WorkerActor
            options["resources"] = {pool: 1}
            options["num_gpus"] = 0 if pool == STORE_POOL else self._gpu_share
        actor: Any = ray.remote(kind).options(**options)
        return RayProcess(actor.remote(pool, worker_id, port, self._settings), pool)


async def _load(pool: str, channel: grpc.aio.Channel, timeout_s: float) -> worker_pb2.WorkerLoad:
    """What the service says of itself. A router's is empty, a page store's has the pages of its memory."""
    if pool == "router":
        request = health_pb2.HealthCheckRequest(service=_INFERENCE)
        await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        return worker_pb2.WorkerLoad()
    if pool == STORE_POOL:
        store = page_store_pb2_grpc.PageStoreStub(channel)
        host = (await store.Describe(worker_pb2.DescribeRequest(), timeout=timeout_s)).host
        return worker_pb2.WorkerLoad(total_pages=host.total_pages, held_pages=host.pages)
    stub = worker_pb2_grpc.WorkerStub(channel)
    description = await stub.Describe(worker_pb2.DescribeRequest(), timeout=timeout_s)
    return description.load  # type: ignore[no-any-return]  # the stubs are untyped


def _resources() -> tuple[dict[str, float], dict[str, float]]:
    return ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]


async def _result(reference: Awaitable[T]) -> T:
    """What the actor's call returned. Raises `WorkerLost` where the actor is gone."""
    try:
        return await reference
    except RayError as error:
        raise errors.WorkerLost(explain(error)) from error


def unpack(reply: tuple[str, bytes]) -> str:
    """An actor's answer. Errors come as messages, so that no surprise of theirs has to be unpickled."""
    value, detail = reply
    if detail:
        raise status.from_detail(common_pb2.ErrorDetail.FromString(detail))
    return value


def explain(error: RayError) -> str:
    """Ray's reason in a line: its errors are paragraphs with advice of their own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("The actor")), lines[-1] if lines else "")
    return reason.partition(" Some common causes")[0][:400] or type(error).__name__

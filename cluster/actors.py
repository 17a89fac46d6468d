"""The Ray actors. Each runs one asyncio service; Ray gives its actors uvloop where that is installed."""

import asyncio
import logging
import os
import sys
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import ray

from cluster.config import ClusterConfig
from engine import hub
from engine.config import EngineConfig, WorkerConfig
from protos import errors
from router.config import RouterConfig
from router.tenant import Tenant
from rpc import status

if TYPE_CHECKING:
    from worker.host import WorkerHost

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_GIB = 1 << 30
Reply = tuple[str, bytes]  # a value, or an error as an ErrorDetail message


class _Service(Protocol):
    @property
    def address(self) -> str: ...

    async def stop(self) -> None: ...


class _Worker(_Service, Protocol):
    @property
    def device(self) -> str: ...

    async def drain(self, timeout_s: float) -> None: ...


class ServiceActor(ABC):
    """Start, watch and stop one service. The controller calls; nothing is restarted here."""

    def __init__(self, pool: str, worker_id: str, port: int, settings: str) -> None:
        """`settings` is a `ClusterConfig` as JSON."""
        configure_logging()
        self._pool = pool
        self._worker_id = worker_id
        self._port = port
        self._config = ClusterConfig.model_validate_json(settings)
        self._progress = ""
        self._closed = asyncio.Event()

    @abstractmethod
    async def _serve(self) -> _Service:
        """Start the service."""

    async def place(self) -> tuple[str, int]:
        """The node's address with the start of its Ray id, and this process."""
        return f"{_node_ip()}/{ray.get_runtime_context().get_node_id()[:8]}", os.getpid()

    async def progress(self) -> str:
        """What the start is doing."""
        return self._progress

    async def start(self) -> Reply:
        """Load what is needed and serve; the service's address."""
        try:
            self._service = await self._serve()
        except Exception as error:
            return "", describe_error(error)
        return self._service.address, b""

    async def device(self) -> str:
        """What the started service computes on, or keeps pages in."""
        return ""

    async def drain(self, timeout_s: float) -> Reply:
        """Take nothing new and finish what runs."""
        return "", b""

    async def closed(self) -> None:
        """Returns when the service has been stopped; fails when the process dies."""
        await self._closed.wait()

    async def stop(self) -> None:
        """End the service in good order."""
        await self._service.stop()
        self._closed.set()

    async def _find_model(self) -> hub.ResolvedModel:
        """The model as it lies on this node; fetched and converted where it does not."""
        model = await asyncio.to_thread(hub.resolve, self._config.model, self._report, self._config.engine.load)
        self._report("loading the model")
        return model

    def _report(self, text: str) -> None:
        self._progress = text
        log.info("%s: %s", self._worker_id, text)


class WorkerActor(ServiceActor):
    """A worker of any pool."""

    async def _serve(self) -> _Service:
        model = await self._find_model()
        config = WorkerConfig(
            worker_id=self._worker_id,
            model=str(model.path),
            redis_url=self._config.redis or "",
            cluster=self._config.name,
            host=node_host(self._config),
            port=self._port,
            engine=self._engine(),
            transports=self._config.transports,
            verify=self._config.verify,
        )
        self._worker: _Worker = await _worker_class(self._pool).start(config, self._report)
        return self._worker

    def _engine(self) -> EngineConfig:
        """The settings, with this worker's part of the GPU that Ray has given it."""
        engine = self._config.engine.to_engine()
        context: Any = ray.get_runtime_context()
        share: float = context.get_assigned_resources().get("GPU", 1.0)
        return replace(engine, gpu_memory=engine.gpu_memory * share)

    async def device(self) -> str:
        return self._worker.device

    async def drain(self, timeout_s: float) -> Reply:
        try:
            await self._worker.drain(timeout_s)
        except Exception as error:
            return "", describe_error(error)
        return "", b""


class RouterActor(ServiceActor):
    """A router."""

    async def _serve(self) -> _Service:
        from router.service import Router

        model = await self._find_model()
        return await Router.start(
            RouterConfig(
                router_id=self._worker_id,
                model=str(model.path),
                model_id=model.model_id,
                redis_url=self._config.redis or "",
                cluster=self._config.name,
                host=self._config.host or node_host(self._config),
                port=self._port,
                tenants=self._tenants(),
                tenant_secret=self._config.tenant_secret,
                **self._config.router.model_dump(),
            )
        )

    def _tenants(self) -> tuple[Tenant, ...]:
        return tuple(Tenant(name=name, **tenant.model_dump()) for name, tenant in self._config.tenants.items())


class PageStoreActor(ServiceActor):
    """A node's page store."""

    async def _serve(self) -> _Service:
        from page_store.config import PageStoreConfig
        from page_store.store import PageStore

        settings = self._config.store
        folder = settings.disk_dir or hub.cache_dir() / "pages"
        return await PageStore.start(
            PageStoreConfig(
                store_id=self._worker_id,
                redis_url=self._config.redis or "",
                host_bytes=int(settings.host_gib * _GIB),
                cluster=self._config.name,
                host=node_host(self._config),
                port=self._port,
                disk_dir=folder / self._config.name if settings.disk_gib else None,
                disk_bytes=int(settings.disk_gib * _GIB),
                transports=self._config.transports,
            )
        )

    async def device(self) -> str:
        settings = self._config.store
        disk = f", {settings.disk_gib:g} GiB of disk" if settings.disk_gib else ""
        return f"{settings.host_gib:g} GiB of memory{disk}"


def _worker_class(pool: str) -> "type[WorkerHost]":
    """What serves is imported here, so that a decode node never loads prefill's code."""
    if pool == "prefill":
        from prefill_worker.service import PrefillWorker

        return PrefillWorker
    if pool == "decode":
        from decode_worker.service import DecodeWorker

        return DecodeWorker
    from colocated_worker.service import ColocatedWorker

    return ColocatedWorker


def configure_logging() -> None:
    """To stderr, which Ray keeps in a file of its own for each process."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def node_host(config: ClusterConfig) -> str:
    """Where a service listens that other processes of the cluster call."""
    return _node_ip() if config.ray_address else LOOPBACK


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def describe_error(error: Exception) -> bytes:
    """An `ErrorDetail` message. What nobody foresaw goes to this process's log in full."""
    if not isinstance(error, errors.DiptychError):
        log.error("unexpected", exc_info=error)
        error = errors.DiptychError(f"{type(error).__name__}: {error}")
    return status.to_detail(error).SerializeToString()

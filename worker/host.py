"""A worker from start to stop: model, pool, engine, transports, service, registration."""

import asyncio
import logging
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Self

import grpc.aio
import torch
from torch import Tensor

from engine.config import WorkerConfig
from engine.device_runner import DeviceRunner
from engine.engine import Engine, Runner
from engine.loader import LoadedModel, load_model
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from kvstore.announcer import Announcer
from kvstore.cuda import Event
from kvstore.device_segment import DeviceSegment
from kvstore.directory import WorkerRecord
from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.page_format import PageFormat
from kvstore.pool import PagePool
from kvstore.redis_directory import RedisDirectoryWriter
from kvstore.reuse_rate import ReuseRate
from kvstore.segment import Segment
from kvstore.transports import registry
from protos.errors import DeadlineExceeded, DiptychError
from protos.v1 import worker_pb2, worker_pb2_grpc
from rpc.server import RpcServer, start_server
from worker.followers import Followers
from worker.loop import WorkerLoop
from worker.page_checksums import PageChecksums
from worker.page_holder import PageHolder
from worker.pool_size import pool_pages
from worker.puller import Puller
from worker.role import Role, is_idle
from worker.service import WorkerService

log = logging.getLogger(__name__)

# Routers poll the directory twice a second, so by then none of them sends anything new to a draining worker.
_DRAIN_SETTLES_S = 2.0
_FIRST_LEASE_S = 3.0


class WorkerHost(ABC):
    """One worker of one pool; the subclass says which, and brings its role."""

    pool_name: str

    def __init__(self, config: WorkerConfig, loaded: LoadedModel) -> None:
        """Everything but the network. Takes the time of allocating the pool."""
        self.config = config = replace(config, engine=config.engine.sized_for(loaded.model.device.type))
        self.worker_id = config.worker_id
        self.incarnation = secrets.randbits(63)
        self.address = ""
        self._loaded = loaded
        self._drained_at: float | None = None
        # An event behind everything that the engine has launched; None where a step is over when it was launched.
        self.launched: Callable[[], Event | None] = lambda: None
        engine_config, model = config.engine, loaded.config
        dtype = loaded.model.cache_dtype
        self._format = PageFormat(
            model.layers, model.kv_heads, engine_config.page_size, model.head_dim, str(dtype).removeprefix("torch.")
        )
        self.segment, cache = self._make_pool()
        self._checksums = PageChecksums(cache) if config.verify == "checksum" else None
        self._writer = RedisDirectoryWriter(config.redis_url, config.cluster)
        self._announcer = Announcer(self._writer, self._record)
        pages = self.segment.num_pages
        pool = PagePool(pages, self.segment.generations.data, self._evicted, ReuseRate(pages))
        self._followers = Followers(pool)
        scheduler = Scheduler(pool, engine_config, self._sealed)
        engine = Engine(scheduler, self._make_runner(cache))
        self._page_servers = registry.serve(config.transports, self.segment, config.host)
        self._role = self.make_role(engine)
        self._role.checksums = self._checksums
        self._loop = WorkerLoop(self._role)
        self._server: RpcServer | None = None

    def _sealed(self, page: Lineage) -> None:
        """A page is indexed now; in the loop's thread, as is `_evicted`."""
        self._announcer.sealed(page.family, page.key)
        self._followers.sealed(page)

    def _evicted(self, key: PageKey) -> None:
        self._announcer.evicted(key)
        self._followers.evicted(key)

    def _make_pool(self) -> tuple[Segment | DeviceSegment, Tensor]:
        """The worker's pages where its model computes, and the same as [pages, layers, 2, kv_heads, page_size, d]."""
        model = self._loaded.model
        num_pages = pool_pages(self.config.engine, model, self._format.page_bytes)
        segment_class = DeviceSegment if model.device.type == "cuda" else Segment
        segment = segment_class.create(self._format, num_pages, self.incarnation)
        cache = torch.as_tensor(segment.pages, device=model.device)  # shares their memory
        return segment, cache.view(model.cache_dtype).view(-1, *self._format.shape)

    def _make_runner(self, cache: Tensor) -> Runner:
        if not cache.is_cuda:
            return ModelRunner(self._loaded.model, cache, self.config.engine)
        runner = DeviceRunner(self._loaded.model, cache, self.config.engine)
        self.launched = runner.last_event
        return runner

    @abstractmethod
    def make_role(self, engine: Engine) -> Role:
        """The pool's own behaviour."""

    def make_puller(self) -> Puller:
        """What brings others' pages here, and tells the role of it in the loop's thread."""
        transports = self.config.transports
        return Puller(self.segment, transports, lambda tell: self._loop.post_wait(tell), self.launched, self._checksums)

    @classmethod
    async def start(cls, config: WorkerConfig, progress: Callable[[str], None] = log.info) -> Self:
        """Load, listen, register. `progress` gets a line now and then, from another thread.

        Raises `ModelUnusable`, `PortTaken` or `MetadataUnavailable`.
        """
        torch.set_num_threads(config.engine.threads)
        engine = config.engine
        loaded = await asyncio.to_thread(
            load_model, config.model, engine.dtype, engine.device, load=engine.load, progress=progress
        )
        worker = cls(config, loaded)
        try:
            await worker._serve()
        except BaseException:
            await worker.stop()
            raise
        return worker

    async def _serve(self) -> None:
        self._loop.start()
        service = WorkerService(self._loop, self._followers, self.describe, self.start_draining, self._checksums)

        def register(server: grpc.aio.Server) -> None:
            worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
            worker_pb2_grpc.add_PageHolderServicer_to_server(PageHolder(self._loop), server)

        names = [service.full_name for service in worker_pb2.DESCRIPTOR.services_by_name.values()]
        self._server = await start_server(register, names, self.config.host, self.config.port)
        self.address = self._server.address
        # Once by hand, so that a directory that does not answer is an error of the start.
        await asyncio.to_thread(self._writer.renew, self._record(), _FIRST_LEASE_S)
        self._announcer.start()

    def describe(self) -> worker_pb2.WorkerDescription:
        """What routers and the controller need to know. Never waits for a step, however long one takes."""
        if not self._loop.alive:
            raise DiptychError(f"{self.worker_id} has no engine any more", stage="describe")
        return worker_pb2.WorkerDescription(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            pool=self.pool_name,
            model=self.config.model,
            fingerprint=self._loaded.fingerprint,
            source=worker_pb2.PageSource(
                worker_id=self.worker_id,
                incarnation=self.incarnation,
                format=self._format.to_proto(),
                endpoints=[server.endpoint for server in self._page_servers],
            ),
            max_tokens=self._max_tokens,
            load=self._loop.load,
            draining=self._drained_at is not None,
        )

    def start_draining(self) -> None:
        """Ask routers to send nothing new. What is on its way is still served, so that no request fails by this."""
        if self._drained_at is None:
            self._drained_at = time.monotonic()

    async def wait_idle(self, timeout_s: float) -> None:
        """Wait until a draining worker holds nothing for anyone. Raises `DeadlineExceeded` with what is left."""
        deadline = time.monotonic() + timeout_s
        while True:
            settled = self._drained_at is not None and time.monotonic() - self._drained_at >= _DRAIN_SETTLES_S
            if settled and is_idle(self._loop.load):
                return
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{self.worker_id} still works after {timeout_s:.0f} s", stage="drain")
            await asyncio.sleep(0.05)

    async def drain(self, timeout_s: float = 600.0) -> None:
        """Take nothing new and finish what runs."""
        self.start_draining()
        await self.wait_idle(timeout_s)

    async def stop(self) -> None:
        """Deregister, hang up, end the threads, give back the memory. Safe to call at any stage of the start."""
        await asyncio.to_thread(self._announcer.stop)
        if self._server is not None:
            await self._server.stop()
        await asyncio.to_thread(self._loop.stop)
        for server in self._page_servers:
            server.close()
        self._writer.close()
        self.segment.close()

    @property
    def device(self) -> str:
        """What it computes on, in words for operators; GPUs are numbered as on their node."""
        device = self._loaded.model.device
        if device.type != "cuda":
            return device.type
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
        return f"GPU {visible[device.index or 0]}, {torch.cuda.get_device_name(device)}"

    @property
    def _max_tokens(self) -> int:
        pool_tokens = self.segment.num_pages * self.config.engine.page_size
        return min(self._loaded.config.max_positions, pool_tokens)

    def _record(self) -> WorkerRecord:
        """For the directory; called from the announcer's thread, so it reads only what is safe to read there."""
        load = self._loop.load
        return WorkerRecord(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            pool=self.pool_name,
            address=self.address,
            model=self.config.model,
            fingerprint=self._loaded.fingerprint,
            format=self._format,
            max_tokens=self._max_tokens,
            endpoints=tuple((s.endpoint.transport, s.endpoint.address) for s in self._page_servers),
            draining=self._drained_at is not None,
            load={field.name: getattr(load, field.name) for field in load.DESCRIPTOR.fields},
            pull_rates=self._role.puller.rates.by_transport,
        )

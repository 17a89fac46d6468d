"""A page store from start to stop."""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import Self

import grpc.aio

from kvstore.directory import STORE_POOL, WorkerRecord
from kvstore.keys import PageKey
from kvstore.redis_directory import RedisDirectoryReader, RedisDirectoryWriter
from kvstore.sealed_page import SealedPage
from page_store.config import PageStoreConfig
from page_store.follower import Follower
from page_store.operator_service import StoreService
from page_store.service import HolderService
from page_store.shelf import Shelf
from protos import errors
from protos.v1 import page_store_pb2, page_store_pb2_grpc, worker_pb2, worker_pb2_grpc
from rpc.server import RpcServer, start_server

POLL_S = 0.5
log = logging.getLogger(__name__)

Name = tuple[str, int]  # worker id, incarnation


class PageStore:
    """Follows the workers of its node, holds what they seal in host memory and on disk, and outlives them.

    It takes the page format of the first worker that it meets. Workers of another one are not followed.
    """

    def __init__(self, config: PageStoreConfig) -> None:
        self.config = config
        self.store_id = config.store_id
        self.incarnation = secrets.randbits(63)
        self.address = ""
        self._reader = RedisDirectoryReader(config.redis_url, config.cluster)
        self._writer = RedisDirectoryWriter(config.redis_url, config.cluster)
        self._holder = HolderService(self._locate)
        self._operators = StoreService(self.describe, self._pages, config.transports)
        self._server: RpcServer | None = None
        self._shelf: Shelf | None = None
        self._followers: dict[Name, Follower] = {}
        self._refused: frozenset[Name] = frozenset()
        self._directory_up = True
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: PageStoreConfig) -> Self:
        """Listen, and look for workers. It registers when it has met the first.

        Raises `PortTaken` or `MetadataUnavailable`.
        """
        store = cls(config)
        try:
            await store._reader.ping()
            await store._serve()
        except BaseException:
            await store.stop()
            raise
        return store

    async def stop(self) -> None:
        """Deregister, hang up, end the threads, give back the memory. Pages on the disk stay. May be called again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._drop(list(self._followers))
        if self._server is not None:
            await self._server.stop()
        await asyncio.gather(self._holder.aclose(), self._operators.aclose())
        if self._shelf is not None:
            shelf, self._shelf = self._shelf, None
            await asyncio.to_thread(shelf.close)
        await self._reader.aclose()
        self._writer.close()

    def describe(self) -> page_store_pb2.PageStoreDescription:
        """What operators want to know."""
        description = page_store_pb2.PageStoreDescription(
            store_id=self.store_id,
            incarnation=self.incarnation,
            following=sorted(name for name, _ in self._followers),
        )
        if self._shelf is not None:
            ledger = self._shelf.tiers.ledger
            for tier, (total, held) in ((description.host, ledger.host), (description.disk, ledger.disk)):
                tier.total_pages, tier.pages = total, held
            description.counters.MergeFrom(page_store_pb2.PageStoreCounters(**asdict(ledger.counters())))
            description.source.CopyFrom(self._shelf.record().source)
        return description

    async def _serve(self) -> None:
        def register(server: grpc.aio.Server) -> None:
            worker_pb2_grpc.add_PageHolderServicer_to_server(self._holder, server)
            page_store_pb2_grpc.add_PageStoreServicer_to_server(self._operators, server)

        names = [
            worker_pb2.DESCRIPTOR.services_by_name["PageHolder"].full_name,
            page_store_pb2.DESCRIPTOR.services_by_name["PageStore"].full_name,
        ]
        self._server = await start_server(register, names, self.config.host, self.config.port)
        self.address = self._server.address
        self._task = asyncio.create_task(self._watch(), name="workers of this node")

    def _locate(self, keys: Sequence[PageKey], timeout_s: float) -> list[SealedPage]:
        """In a thread of its own."""
        shelf = self._shelf
        return [] if shelf is None else shelf.tiers.locate(keys, timeout_s)

    def _pages(self) -> Shelf:
        if self._shelf is None:
            raise errors.NoWorkers("this page store has met no worker, so it has no pages yet", stage="measure")
        return self._shelf

    async def _watch(self) -> None:
        while True:
            try:
                await self._apply(await self._reader.workers())
                self._directory_up = True
            except errors.MetadataUnavailable as error:
                if self._directory_up:
                    log.warning("the directory does not answer, those that are followed stay: %s", error.message)
                self._directory_up = False
            except Exception:  # whatever it is, the next reading may be better
                log.exception("the workers of this node could not be followed")
            await asyncio.sleep(POLL_S)

    async def _apply(self, records: list[WorkerRecord]) -> None:
        """Follow who is new on this node, and nobody who is gone."""
        here = {(r.worker_id, r.incarnation): r for r in records if r.pool != STORE_POOL and self._is_near(r)}
        await self._drop([name for name in self._followers if name not in here])
        self._refused &= here.keys()
        for name in here.keys() - self._followers.keys() - self._refused:
            try:
                self._follow(here[name])
            except errors.FixTheSetup as error:
                log.error("%s is not followed: %s", name[0], error.message)
                self._refused |= {name}

    def _follow(self, record: WorkerRecord) -> None:
        """Raises `FormatMismatch`, and what the shelf does that is made for the first worker."""
        if self._shelf is None:
            self._shelf = Shelf(self.config, self.address, self.incarnation, record.format, self._writer)
            self._shelf.start()
        if difference := self._shelf.format.difference(record.format):
            raise errors.FormatMismatch(f"page formats differ, the store's against its own: {difference}")
        log.info("following %s at %s", record.worker_id, record.address)
        follower = Follower(record, self._shelf.tiers, self.config.transports)
        self._followers[record.worker_id, record.incarnation] = follower

    async def _drop(self, names: Sequence[Name]) -> None:
        await asyncio.gather(*(self._followers[name].stop() for name in names))
        for name in names:  # only now: who cancels this must still find those that were not stopped
            del self._followers[name]

    def _is_near(self, record: WorkerRecord) -> bool:
        return _host_of(record.address) == _host_of(self.address)


def _host_of(address: str) -> str:
    return address.rpartition(":")[0]

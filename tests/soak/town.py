"""All processes of a run: a metadata server, routers, workers behind proxies."""

import asyncio
import itertools
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from engine.config import EngineConfig
from kvstore.valkey import EmbeddedValkey
from soak.proxy import Proxy
from soak.slots import Slot
from stack import Service, Stack

PROGRAM = Path(__file__).parent / "serve.py"
WORKERS = ("prefill", "decode", "colocated")
POOLS = {"prefill": 2, "decode": 2, "colocated": 1, "router": 2, "store": 1}
DEADLINE_S = 20.0  # of requests that bring none
SLOW_PULL_S = 1.0
VALKEY_AWAY_S = 2.0
# Small, so that pages are evicted and used again all the time.
ENGINE = EngineConfig(page_size=16, num_pages=48, token_budget=64, max_sequences=8, dtype="float32")
HOST_PAGES, DISK_PAGES = 96, 200  # of the page store
PAGE_BYTES = 8192  # of the tiny model
READY_S = 90.0
LEAK_S = 5.0  # within which everything must be free once the load has ended


class Town:
    """`async with Town(model, logs, planted) as town:` brings all up, and leaves nothing behind."""

    def __init__(self, model: Path, logs: Path, planted: str) -> None:
        self._model = model
        self._logs = logs
        self._planted = planted
        self._names = itertools.count(1)
        self._valkey = EmbeddedValkey()
        self.slots: list[Slot] = []

    async def __aenter__(self) -> Self:
        try:
            self.slots.append(Slot("valkey", self._start_valkey, ()))
            await self.ready()
            for kind, count in POOLS.items():
                for _ in range(count):
                    await self._add(kind)
            await self.ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(slot.stop() for slot in self.slots))
        await asyncio.gather(*(proxy.stop() for slot in self.slots for proxy in slot.proxies))
        await asyncio.to_thread(self._valkey.stop)

    def running(self, *kinds: str) -> list[Slot]:
        """Those of these kinds that have a process and no fault."""
        return [slot for slot in self.slots if slot.kind in kinds and slot.service is not None and not slot.busy]

    async def ready(self) -> None:
        """Wait until every place has its process."""
        give_up = time.monotonic() + READY_S
        while any(slot.service is None or slot.busy for slot in self.slots):
            if time.monotonic() > give_up:
                missing = {slot.kind: slot.refusals[-1:] for slot in self.slots if slot.service is None}
                raise TimeoutError(f"not all processes are back: {missing} are missing; see {self._logs}")
            await asyncio.sleep(0.1)

    async def leaked(self) -> dict[str, int]:
        """Pages that workers still hold or have promised `LEAK_S` after nothing runs any more, by worker."""
        give_up = time.monotonic() + LEAK_S
        while True:
            held = await self._held()
            if not held or time.monotonic() > give_up:
                return held
            await asyncio.sleep(0.1)

    async def _held(self) -> dict[str, int]:
        held = {}
        for slot in self.running(*WORKERS):
            assert slot.service is not None
            load = (await Stack._describe(slot.service.address)).load
            busy = load.total_pages - load.available_pages + load.running + load.waiting
            if busy:
                held[slot.service.name] = busy
        return held

    async def _add(self, kind: str) -> None:
        proxies = (Proxy(), Proxy()) if kind in WORKERS else ()
        for proxy in proxies:
            await proxy.start()
        self.slots.append(Slot(kind, self._start, proxies))

    async def _start_valkey(self, slot: Slot) -> Service:
        """Empty. The directory is away for a while after each loss."""
        await asyncio.to_thread(self._valkey.stop)
        await asyncio.sleep(VALKEY_AWAY_S if slot.starts else 0)
        await asyncio.to_thread(self._valkey.start)
        assert self._valkey._process is not None
        return Service("valkey", self._valkey._process, self._valkey.url)

    async def _start(self, slot: Slot) -> Service:
        name = f"{slot.kind}-{next(self._names)}"
        settings = self._worker(name, slot) if slot.kind in WORKERS else getattr(self, f"_{slot.kind}")(name)
        with (self._logs / f"{name}.log").open("w") as log:
            service = await Stack.spawn(slot.kind, settings, PROGRAM, log)
        for proxy, key in zip(slot.proxies, ("address", "pages"), strict=False):
            proxy.target = service.said.get(key, "")
        return service

    def _router(self, name: str) -> dict[str, Any]:
        common = {"model": str(self._model), "model_id": "tiny", "redis_url": self._valkey.url}
        return common | {"router_id": name, "port": 0, "default_deadline_s": DEADLINE_S}

    @property
    def disk(self) -> Path:
        """Of the page store; it finds again what an earlier life of it has left there."""
        return self._logs / "disk"

    def _store(self, name: str) -> dict[str, Any]:
        room = {"host_bytes": HOST_PAGES * PAGE_BYTES, "disk_bytes": DISK_PAGES * PAGE_BYTES}
        return room | {"store_id": name, "redis_url": self._valkey.url, "disk_dir": str(self.disk)}

    def _worker(self, name: str, slot: Slot) -> dict[str, Any]:
        service, pages = (proxy.address for proxy in slot.proxies)
        first = next(other for other in self.slots if other.kind == slot.kind)
        return {
            "worker_id": name,
            "model": str(self._model),
            "redis_url": self._valkey.url,
            "engine": asdict(ENGINE),
            "transports": ("shm", "tcp") if first is slot else ("tcp",),
            "soak": {"service": service, "pages": pages, "slow": SLOW_PULL_S, "planted": self._planted},
        }

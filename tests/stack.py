"""A whole Diptych without Ray: a real Valkey, a router and workers, each a process of its own."""

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Self

import grpc.aio

from diptych.client import Client
from engine.config import EngineConfig
from kvstore.valkey import EmbeddedValkey
from protos.v1 import worker_pb2, worker_pb2_grpc

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "serve_one.py"
START_S = 60.0


@dataclass
class Service:
    """One process. Ended by its own id."""

    name: str
    process: subprocess.Popen
    address: str
    said: dict = field(default_factory=dict)  # at its start

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    async def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.process.kill()
        await asyncio.to_thread(self.process.wait, 10)

    async def stop(self) -> None:
        """SIGTERM, and time to leave in order."""
        self.process.terminate()
        try:
            await asyncio.to_thread(self.process.wait, 15)
        except subprocess.TimeoutExpired:
            await self.kill()
            raise


@dataclass
class Stack:
    """`async with Stack(model) as stack:` brings everything up, and leaves nothing behind."""

    model: Path
    prefill_workers: int = 1
    decode_workers: int = 1
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(page_size=16, num_pages=128, dtype="float32"))
    transports: tuple[str, ...] = ("shm", "tcp")
    router_settings: dict = field(default_factory=dict)
    colocated_workers: int = 0
    verify: str = "none"
    log: IO | None = None  # what the services say; None: beside what we say
    prefill: list[Service] = field(default_factory=list)
    decode: list[Service] = field(default_factory=list)
    colocated: list[Service] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self.valkey = EmbeddedValkey()
        await asyncio.to_thread(self.valkey.start)
        try:
            await asyncio.gather(
                *(self.add("prefill") for _ in range(self.prefill_workers)),
                *(self.add("decode") for _ in range(self.decode_workers)),
                *(self.add("colocated") for _ in range(self.colocated_workers)),
            )
            self.router = await self.spawn("router", self.router_configuration(), log=self.log)
            self.client = Client(self.router.address)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        if hasattr(self, "client"):
            await self.client.close()
        services = [*self.workers, *([self.router] if hasattr(self, "router") else [])]
        await asyncio.gather(*(service.stop() for service in services))
        await asyncio.to_thread(self.valkey.stop)

    @property
    def workers(self) -> list[Service]:
        return [*self.prefill, *self.decode, *self.colocated]

    async def add(self, pool: str) -> Service:
        """Start one more worker; returns once it is registered."""
        service = await self.spawn(pool, self.worker_settings(pool), log=self.log)
        getattr(self, pool).append(service)
        return service

    async def descriptions(self) -> list[worker_pb2.WorkerDescription]:
        """What every living worker says of itself."""
        living = [worker for worker in self.workers if worker.alive]
        return list(await asyncio.gather(*(self._describe(service.address) for service in living)))

    async def assert_nothing_held(self, within_s: float = 5.0) -> None:
        """No worker holds a page, runs a sequence or has one waiting."""
        deadline = time.monotonic() + within_s
        while True:
            loads = {d.worker_id: d.load for d in await self.descriptions()}
            held = {w: load for w, load in loads.items() if load.held_pages or load.running or load.waiting}
            if not held:
                for load in loads.values():
                    assert load.available_pages == load.total_pages, "a promise was not given back"
                return
            assert time.monotonic() < deadline, f"still held: {held}"
            await asyncio.sleep(0.05)

    def worker_settings(self, pool: str) -> dict:
        return {
            "worker_id": f"{pool}-{os.urandom(3).hex()}",
            "model": str(self.model),
            "redis_url": self.valkey.url,
            "engine": asdict(self.engine),
            "transports": self.transports,
            "verify": self.verify,
        }

    def router_configuration(self) -> dict:
        return {
            "router_id": "router-0",
            "model": str(self.model),
            "model_id": "tiny",
            "redis_url": self.valkey.url,
            "port": 0,
        } | self.router_settings

    @staticmethod
    async def _describe(address: str) -> worker_pb2.WorkerDescription:
        async with grpc.aio.insecure_channel(address) as channel:
            return await worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=10)

    @staticmethod
    async def spawn(kind: str, settings: dict, program: Path = PROGRAM, log: IO | None = None) -> Service:
        """Start one service; `RuntimeError` with what it said where it does not start."""
        process = subprocess.Popen(
            [sys.executable, str(program), kind, json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        )
        with process.stdout:
            line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), START_S)
        answer = json.loads(line or '{"error": "the process ended without a word"}')
        if "error" in answer:
            await asyncio.to_thread(process.wait, 15)
            raise RuntimeError(f"{kind} did not start: {answer}")
        return Service(settings.get("worker_id", kind), process, answer["address"], answer)

"""A worker's pool in a process of its own: `Owner` starts this file as a program and gives it orders."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import numpy as np

from kvstore.device_segment import DeviceSegment
from kvstore.page_format import PageFormat
from kvstore.pool import PageId, PagePool
from kvstore.segment import Segment
from kvstore.transports import registry
from protos.v1 import worker_pb2

SMALL = PageFormat(layers=2, kv_heads=2, page_size=16, head_dim=8, dtype="float32")  # 4 KiB
LARGE = PageFormat(layers=16, kv_heads=8, page_size=64, head_dim=256, dtype="float32")  # 16 MiB
INCARNATION = 0x1234_5678_9ABC_DEF0


class Owner:
    """The handle that tests hold. Leaving the `with` block ends the process."""

    def __init__(self, page_format: PageFormat = SMALL, num_pages: int = 8, device: int | None = None) -> None:
        """On a GPU where `device` is one."""
        self.format = page_format
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started = self.ask(format=asdict(page_format), num_pages=num_pages, device=device)
        self.endpoints: dict[str, str] = started["endpoints"]

    def ask(self, **order):
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def fill(self, *values: int) -> list[tuple[int, int]]:
        """Sealed pages whose bytes all have these values, as (page, generation)."""
        return [(page, generation) for page, generation in self.ask(call="fill", values=values)]

    def fill_random(self, *seeds: int) -> list[tuple[int, int]]:
        """As `fill`, but with `random_page` of these seeds."""
        return [(page, generation) for page, generation in self.ask(call="fill_random", seeds=seeds)]

    def free(self, page: int) -> None:
        self.ask(call="free", page=page)

    def close_segment(self) -> None:
        """The process goes on without its pages."""
        self.ask(call="close_segment")

    def rewrite(self, page: int, value: int) -> None:
        """Free the page, take it again, and write it."""
        self.ask(call="rewrite", page=page, value=value)

    def fill_and_rewrite_soon(self, values: list[int], within_s: float) -> list[tuple[int, int]]:
        """As `fill`; but each page is freed and written anew at some moment within the time."""
        refs = self.ask(call="fill_and_rewrite_soon", values=values, within_s=within_s)
        return [(page, generation) for page, generation in refs]

    def source(self, *transports: str, **other) -> worker_pb2.PageSource:
        endpoints = [worker_pb2.Endpoint(transport=name, address=self.endpoints[name]) for name in transports]
        fields = {"worker_id": "owner", "incarnation": INCARNATION, "format": self.format.to_proto()}
        return worker_pb2.PageSource(**(fields | {"endpoints": endpoints} | other))

    def freeze(self) -> None:
        """Stop it where it is, all its threads."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def reset(self) -> None:
        """Free every page."""
        self.ask(call="reset")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Owner":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGCONT)
        with self.process:
            self.process.kill()


def random_page(seed: int, page_format: PageFormat) -> np.ndarray:
    """uint8 [page_bytes]"""
    return np.random.default_rng(seed).integers(0, 256, page_format.page_bytes, np.uint8)


class _Worker:
    """What runs in the process."""

    def __init__(self, page_format: PageFormat, num_pages: int, device: int | None) -> None:
        self._segment: Segment | DeviceSegment
        if device is None:
            self._segment = Segment.create(page_format, num_pages, INCARNATION)
        else:
            self._segment = DeviceSegment.create(page_format, num_pages, INCARNATION, device)
        self._pool = PagePool(num_pages, self._segment.generations)
        self._servers = registry.serve(["cuda_ipc", "shm", "nixl", "tcp"], self._segment, "127.0.0.1")
        self.endpoints = {server.endpoint.transport: server.endpoint.address for server in self._servers}
        self._background: threading.Thread | None = None

    def settle(self) -> None:
        if self._background is not None:
            self._background.join()

    def fill(self, values: list[int]) -> list[tuple[int, int]]:
        return [self._write(self._pool.promise(1).take(), value) for value in values]

    def fill_random(self, seeds: list[int]) -> list[tuple[int, int]]:
        return [self._write(self._pool.promise(1).take(), random_page(seed, self._segment.format)) for seed in seeds]

    def free(self, page: int) -> None:
        self._pool.release([PageId(page)])

    def close_segment(self) -> None:
        self._segment.close()

    def reset(self) -> None:
        for page in range(self._pool.total_pages):
            if self._pool.readers(PageId(page)):
                self.free(page)

    def rewrite(self, page: int, value: int) -> None:
        self.free(page)
        others = []
        while (taken := self._pool.promise(1).take()) != page:
            others.append(taken)
        for other in others:
            self._pool.abandon(other)
        self._write(taken, value)

    def fill_and_rewrite_soon(self, values: list[int], within_s: float) -> list[tuple[int, int]]:
        refs = self.fill(values)

        def rewrite() -> None:
            time.sleep(random.random() * within_s)
            for page, _ in refs:
                self.rewrite(page, 255)
            for page, _ in refs:
                self.free(page)

        self._background = threading.Thread(target=rewrite)
        self._background.start()
        return refs

    def _write(self, page: PageId, value: int | np.ndarray) -> tuple[int, int]:
        self._pool.begin_fill(page)
        if isinstance(self._segment, DeviceSegment):
            self._write_on_gpu(self._segment, page, value)
        else:
            self._segment.pages[page] = value
        self._pool.seal(page, None)
        return page, self._pool.generation(page)

    @staticmethod
    def _write_on_gpu(segment: DeviceSegment, page: PageId, value: int | np.ndarray) -> None:
        import torch

        pages = torch.as_tensor(segment.pages, device=f"cuda:{segment.device}")  # [num_pages, page_bytes]
        pages[page] = torch.as_tensor(value, dtype=torch.uint8)
        torch.cuda.synchronize(segment.device)  # a page is sealed only when its bytes are there


def main() -> None:
    first = json.loads(sys.stdin.readline())
    worker = _Worker(PageFormat(**first["format"]), first["num_pages"], first["device"])
    print(json.dumps({"endpoints": worker.endpoints}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        worker.settle()
        print(json.dumps(getattr(worker, order.pop("call"))(**order)), flush=True)


if __name__ == "__main__":
    main()

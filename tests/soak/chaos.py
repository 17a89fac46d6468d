"""Faults, one after the other and several at once."""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from soak.slots import Slot
from soak.town import WORKERS, Town

PAUSE_S = (0.6, 2.4)  # between two faults
FREEZE_S = (3.5, 5.0)  # longer than a lease
STALL_S = (0.2, 1.5)  # shorter
SLOW_S = (2.0, 5.0)
DAMAGED = 20  # files at a time


@dataclass(frozen=True)
class Fault:
    """Happens `weight` times as often as one of weight 1, to one process of these kinds."""

    name: str
    weight: int
    kinds: tuple[str, ...]
    act: Callable[["Chaos", Slot], Awaitable[None]]


class Chaos:
    """Does something bad every second or two. `stop` makes all well again."""

    def __init__(self, town: Town, rng: random.Random) -> None:
        self._town = town
        self._rng = rng
        self.done: Counter[str] = Counter()
        self._under_way: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Begin nothing new, and wait until what is under way has healed."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        while self._under_way:
            await asyncio.gather(*self._under_way)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))
            (fault,) = self._rng.choices(FAULTS, [fault.weight for fault in FAULTS])
            if slots := self._town.running(*fault.kinds):
                slot = self._rng.choice(slots)
                self.done[f"{fault.name}: {slot.kind}"] += 1
                task = asyncio.create_task(self._act(fault, slot))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def _act(self, fault: Fault, slot: Slot) -> None:
        slot.busy = True
        try:
            await fault.act(self, slot)
        finally:
            slot.busy = False

    async def _kill(self, slot: Slot) -> None:
        slot.signal(signal.SIGKILL)

    async def _freeze(self, slot: Slot) -> None:
        await self._hold_still(slot, FREEZE_S)

    async def _stall(self, slot: Slot) -> None:
        await self._hold_still(slot, STALL_S)

    async def _hold_still(self, slot: Slot, seconds: tuple[float, float]) -> None:
        slot.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(self._rng.uniform(*seconds))
        finally:
            slot.signal(signal.SIGCONT)

    async def _cut(self, slot: Slot) -> None:
        slot.proxies[0].cut()

    async def _cut_pages(self, slot: Slot) -> None:
        slot.proxies[1].cut()

    async def _slow(self, slot: Slot) -> None:
        for proxy in slot.proxies:
            proxy.delay_s = self._rng.choice([0.02, 0.1, 0.4])
        await asyncio.sleep(self._rng.uniform(*SLOW_S))
        for proxy in slot.proxies:
            proxy.delay_s = 0.0

    async def _strand(self, slot: Slot) -> None:
        """A decode worker stands still while prefill workers lose their routers: the pins go, the pages are used
        again, and it wakes in the middle of its pulls.
        """
        stalled = asyncio.create_task(self._stall(slot))
        await asyncio.sleep(0.02)
        for prefill in self._town.running("prefill"):
            prefill.proxies[0].cut()
        await stalled

    async def _damage(self, slot: Slot) -> None:
        """Cut some of the page store's files short, and change a byte in others."""
        files = [path for path in self._town.disk.rglob("*") if path.is_file() and path.stat().st_size > 100]
        for path in self._rng.sample(files, min(DAMAGED, len(files))):
            with suppress(FileNotFoundError):  # it may go at any time
                size = path.stat().st_size
                with path.open("r+b") as file:
                    if self._rng.random() < 0.3:
                        file.truncate(self._rng.randrange(size))
                    else:
                        file.seek(self._rng.randrange(size))
                        file.write(b"\xa5")


FAULTS = (
    Fault("kill", 4, WORKERS, Chaos._kill),
    Fault("kill", 1, ("router",), Chaos._kill),
    Fault("kill", 1, ("valkey",), Chaos._kill),
    Fault("kill", 1, ("store",), Chaos._kill),
    Fault("freeze", 5, (*WORKERS, "router", "valkey", "store"), Chaos._freeze),
    Fault("stall", 6, (*WORKERS, "router", "store"), Chaos._stall),
    Fault("cut from routers", 4, WORKERS, Chaos._cut),
    Fault("cut page streams", 4, ("prefill",), Chaos._cut_pages),
    Fault("slow connections", 4, WORKERS, Chaos._slow),
    Fault("damage files on disk", 2, ("store",), Chaos._damage),
    Fault("stall while prefill loses its routers", 6, ("decode",), Chaos._strand),
)

"""Places for processes: whoever is killed is started again."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

from soak.proxy import Proxy
from stack import Service

POLL_S = 0.05
AGAIN_S = 1.0  # after a start that failed


class Slot:
    """A place for one process of a `kind`, in front of which `proxies` may stand. `start` starts it."""

    def __init__(self, kind: str, start: Callable[["Slot"], Awaitable[Service]], proxies: tuple[Proxy, ...]) -> None:
        self.kind = kind
        self.proxies = proxies
        self.service: Service | None = None  # while it runs
        self.busy = False  # with a fault
        self.crashes = 0  # ends that nobody asked for
        self.starts = 0
        self.refusals: list[str] = []  # what was said by those that did not start
        self._start = start
        self._asked_to_end = False
        self._stopping = False
        self._keeper = asyncio.create_task(self._keep())

    def signal(self, number: signal.Signals) -> None:
        """Does nothing where it has ended by now."""
        if self.service is not None and self.service.alive:
            self._asked_to_end |= number == signal.SIGKILL
            self.service.process.send_signal(number)

    async def stop(self) -> None:
        """End it for good."""
        self._stopping = True
        while not self._keeper.done():
            self.signal(signal.SIGKILL)
            await asyncio.wait({self._keeper}, timeout=POLL_S)
        self._keeper.result()

    async def _keep(self) -> None:
        while not self._stopping:
            try:
                service = await self._start(self)
            except RuntimeError as error:  # the metadata server is away, most likely: what is needed at a start
                self.refusals.append(str(error))
                await asyncio.sleep(AGAIN_S)
                continue
            self.starts += 1
            self.service = service
            while service.alive:
                await asyncio.sleep(POLL_S)
            self.service = None
            self.crashes += not self._asked_to_end
            self._asked_to_end = False

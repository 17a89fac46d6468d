"""Clients that ask without a pause, and judge each answer by its clean one."""

import asyncio
import itertools
import random
from collections.abc import Sequence

from diptych.client import Chunk, Client
from protos import errors
from soak.cases import Case
from soak.tally import Tally
from soak.town import DEADLINE_S, Town

CLIENTS = 16
ABORTS = 0.15  # share of requests that their client gives up soon; a third of these have their answer before
SHORT_DEADLINES = 0.03
LATE_S = 8.0  # after its deadline a request is late: a router may be frozen for 5 s just then
COOL_S = 0.1  # after an error


class Load:
    """`CLIENTS` clients until `stop`."""

    def __init__(self, town: Town, cases: Sequence[Case], tally: Tally, rng: random.Random) -> None:
        self._town = town
        self._cases = cases
        self._tally = tally
        self._rng = rng
        self._clients: dict[str, Client] = {}  # by the address of a router
        self._stopping = False
        self._names = itertools.count(1)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._stopping = False
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(CLIENTS)]

    async def stop(self) -> None:
        """Ask nothing more, and wait for every answer."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        for client in self._clients.values():
            await client.close()
        self._clients.clear()

    async def _ask_on(self) -> None:
        while not self._stopping:
            routers = [slot.service for slot in self._town.slots if slot.kind == "router" and slot.service]
            if not routers:
                await asyncio.sleep(COOL_S)
                continue
            address = self._rng.choice(routers).address
            client = self._clients.setdefault(address, Client(address))
            if not await self._ask(client, self._rng.choice(self._cases)):
                await asyncio.sleep(COOL_S)

    async def _ask(self, client: Client, case: Case) -> bool:
        """One request from its start to its end; whether it ended well."""
        got: list[int] = []
        ends = self._abort_after()
        deadline_s, passed_on = self._deadline()
        name = f"soak-{next(self._names)}"
        stream = client.generate(token_ids=case.prompt, deadline_s=passed_on, request_id=name, **case.sampling)
        last: Chunk | None = None
        outcome = ""
        try:
            async with asyncio.timeout(min(ends, deadline_s + LATE_S)):
                async for chunk in stream:
                    got += chunk.token_ids
                    last = chunk
        except errors.DiptychError as error:
            outcome = f"{error.code} ({error.stage or 'no stage'})"
            if isinstance(error, errors.DeadlineExceeded):
                if deadline_s < DEADLINE_S:
                    outcome = "deadline_exceeded (one that was meant to be too short)"
                else:
                    self._tally.stuck.append(f"{name}: {error}")
        except TimeoutError:
            outcome = "aborted" if ends < deadline_s else "late"
        finally:
            await stream.aclose()
        whole = last is not None and last.finish_reason is not None
        self._tally.check(case.answer, got, whole, name)
        if last is not None and whole:
            self._tally.note_answer(last)
        else:
            self._tally.outcomes[outcome or "internal (the stream ended early)"] += 1
        return whole

    def _abort_after(self) -> float:
        return self._rng.expovariate(5.0) if self._rng.random() < ABORTS else float("inf")

    def _deadline(self) -> tuple[float, float | None]:
        """Of the request, in seconds; and what the call says: where it says nothing, only the router can end it."""
        if self._rng.random() < SHORT_DEADLINES:
            short = self._rng.uniform(0.05, 1.0)
            return short, short
        return DEADLINE_S, DEADLINE_S if self._rng.random() < 0.5 else None

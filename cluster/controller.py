"""Holds a cluster at its desired size: starts, drains, stops and replaces workers and the router."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping

from cluster.config import MAX_WORKERS, MODES, POOLS, ClusterConfig, redact
from cluster.launcher import Launcher
from cluster.member import Member
from cluster.reconcile import Drain, Failures, Phase, Policy, Pool, Start, Stop, reconcile, settle
from kvstore.directory import STORE_POOL
from protos import errors
from protos.v1 import operator_pb2

log = logging.getLogger(__name__)

ROUTER = "router"
_TICK_S = 0.5  # between two looks when nothing happens
_END_S = 20.0  # more than one member takes to stop


class Controller:
    """The loop and its state, without Ray or gRPC: `launcher` starts processes, `ping` raises while Redis is away."""

    def __init__(
        self,
        config: ClusterConfig,
        launcher: Launcher,
        ping: Callable[[], Awaitable[None]],
        policy: Policy,
        stores: int = 0,
    ) -> None:
        self._config = config
        self._launcher = launcher
        self._ping = ping
        self._policy = policy
        sizes = {"prefill": config.prefill, "decode": config.decode, "colocated": config.colocated}
        self._desired = {**sizes, STORE_POOL: stores, ROUTER: 1}
        self._failures = dict.fromkeys(self._desired, Failures())
        self._failed_ids = dict.fromkeys(self._desired, "")  # the last that failed
        self._router_port = config.port
        self._members: dict[str, Member] = {}
        self._started = dict.fromkeys(self._desired, 0)  # numbers given out
        self._redis_alive = False
        self._wake = asyncio.Event()
        self._ending = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Reconcile until `shutdown`; all that was started has ended when this returns."""
        self._own(self._look())
        try:
            while not self._ending:
                self._reconcile()
                await self._sleep()
        finally:
            await self._end()

    def scale(self, desired: Mapping[str, int]) -> None:
        """Set the size of the pools that are named. Raises `InvalidRequest`."""
        for pool, size in desired.items():
            if pool not in (*POOLS, STORE_POOL):
                named = ", ".join((*POOLS, STORE_POOL))
                raise errors.InvalidRequest(f"no pool {pool!r}: name one of {named}", field="desired")
            if pool == STORE_POOL and size and not self._config.store.host_gib:
                raise errors.InvalidRequest("this cluster was started without --host-cache", field="desired")
            if not 0 <= size <= MAX_WORKERS:
                raise errors.InvalidRequest(f"{pool}: 0 to {MAX_WORKERS} workers, not {size}", field="desired")
        if self._ending:
            raise errors.NoWorkers("the cluster is ending", stage="scale")
        self._desired.update(desired)
        self._failures.update(dict.fromkeys(desired, Failures()))  # whoever asks again may have mended it
        log.info("desired: %s", self._desired)
        self._wake.set()

    def shutdown(self) -> None:
        """Ask `run` to end routers and workers and return."""
        self._ending = True
        self._wake.set()

    def status(self) -> operator_pb2.StatusResponse:
        """As of the last look, at most a second or two ago."""
        routers = [member.address for member in self._of(ROUTER) if member.phase is Phase.READY]
        return operator_pb2.StatusResponse(
            model=self._config.model,
            pools=self.pools(),
            routers=routers,
            redis=redact(self._config.redis or ""),
            redis_alive=self._redis_alive,
            ready=not self._ending and all(self._is_ready(pool) for pool in self._desired),
        )

    def pools(self) -> list[operator_pb2.PoolStatus]:
        """Each pool's desired number, its workers, and its last failure while that stands.

        A pool that the cluster's mode does not have is listed while it has or should have workers.
        """
        always = (*MODES[self._config.mode], ROUTER)
        listed = (self._pool_status(pool) for pool in self._desired)
        return [status for status in listed if status.pool in always or status.desired or status.workers]

    def _pool_status(self, pool: str) -> operator_pb2.PoolStatus:
        return operator_pb2.PoolStatus(
            pool=pool,
            desired=self._desired[pool],
            workers=[*(member.status() for member in self._of(pool)), *self._failed(pool)],
        )

    def _failed(self, pool: str) -> list[operator_pb2.WorkerStatus]:
        failures = self._failures[pool]
        if not failures.is_failed(self._policy):
            return []
        times = f" ({failures.count} times in a row)" if failures.count > 1 else ""
        return [
            operator_pb2.WorkerStatus(
                worker_id=self._failed_ids[pool],
                state=operator_pb2.WORKER_STATE_FAILED,
                message=failures.reason + times,
            )
        ]

    def _is_ready(self, pool: str) -> bool:
        active = [member for member in self._of(pool) if member.phase in (Phase.STARTING, Phase.READY)]
        ready = [member for member in active if member.phase is Phase.READY and member.answers]
        return len(ready) == len(active) == self._desired[pool]

    def _of(self, pool: str) -> list[Member]:
        return [member for member in self._members.values() if member.pool == pool]

    def _reconcile(self) -> None:
        now = time.monotonic()
        pools = {}
        for name, desired in self._desired.items():
            pool = Pool(desired, tuple(member.view() for member in self._of(name)), self._failures[name])
            self._failures[name] = settle(pool, now, self._policy)
            pools[name] = pool
        for action in reconcile(pools, now, self._policy):
            log.info("%s", action)
            match action:
                case Start(pool=name):
                    self._start(name)
                case Drain(worker_id=worker_id):
                    self._members[worker_id].enter(Phase.DRAINING)
                    self._own(self._drain(self._members[worker_id]))
                case Stop(worker_id=worker_id):
                    self._members[worker_id].enter(Phase.STOPPING)
                    self._own(self._stop(self._members[worker_id]))

    def _start(self, pool: str) -> None:
        self._started[pool] += 1
        number = self._started[pool]
        worker_id = f"{pool}-{number}"
        port = self._router_port if pool == ROUTER else 0
        member = Member(pool, worker_id, number, self._launcher.launch(pool, worker_id, port))
        self._members[worker_id] = member
        self._own(self._live(member))

    async def _live(self, member: Member) -> None:
        """Its life up to its end, which counts as a failure unless it was asked to leave."""
        try:
            await member.live(self._config.start_timeout_s)
        except errors.DiptychError as error:
            if member.pool == ROUTER and member.address:  # clients know it: the next one takes its place
                self._router_port = int(member.address.rpartition(":")[2])
            leaving = member.phase in (Phase.DRAINING, Phase.STOPPING) or self._ending
            if not leaving:
                self._note_failure(member, error)
        if member.phase is not Phase.STOPPING:  # whoever stops it also ends it
            await member.kill()
            self._forget(member)

    def _note_failure(self, member: Member, error: errors.DiptychError) -> None:
        reason = error.message
        if not member.node:
            reason = f"{reason}; {member.message}"
        log.error("%s failed: %s", member.worker_id, reason)
        hopeless = isinstance(error, errors.FixTheSetup | errors.FixTheRequest)
        self._failed_ids[member.pool] = member.worker_id
        self._failures[member.pool] = self._failures[member.pool].add(reason, time.monotonic(), self._policy, hopeless)

    async def _drain(self, member: Member) -> None:
        await member.drain(self._policy.drain_timeout_s)
        self._wake.set()

    async def _stop(self, member: Member) -> None:
        await member.stop()
        self._forget(member)

    def _forget(self, member: Member) -> None:
        self._members.pop(member.worker_id, None)
        self._wake.set()

    async def _look(self) -> None:
        """Ask all that live how they are, again and again."""
        while not self._ending:
            await asyncio.gather(*(member.look() for member in self._members.values()), self._look_at_redis())
            await asyncio.sleep(_TICK_S)

    async def _look_at_redis(self) -> None:
        try:
            await self._ping()
            self._redis_alive = True
        except errors.DiptychError:  # what it says is in the status
            self._redis_alive = False

    async def _sleep(self) -> None:
        """Until something happens, or the next tick; a task that died of a bug ends the controller here."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), _TICK_S)
        self._wake.clear()
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.discard(task)
            task.result()

    def _own(self, coroutine: Coroutine[None, None, None]) -> None:
        self._tasks.add(asyncio.create_task(coroutine))

    async def _end(self) -> None:
        """The router first: it refuses what is new and tells its clients. Then all workers at once, and the stores."""
        self._ending = True
        for pools in ((ROUTER,), POOLS, (STORE_POOL,)):
            leaving = [m for pool in pools for m in self._of(pool) if m.phase is not Phase.STOPPING]
            for member in leaving:
                member.enter(Phase.STOPPING)
            await asyncio.gather(*(self._stop(member) for member in leaving))
        # With its process gone every task ends by itself.
        _, late = await asyncio.wait(self._tasks, timeout=_END_S)
        for task in late:
            log.error("cancelled at the end: %s", task)
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.error("ended with", exc_info=outcome)

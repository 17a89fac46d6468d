"""The directory in Redis or Valkey, by any URL that `kvstore.redis_url` reads."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext

import redis
from redis.exceptions import RedisClusterException

from kvstore import redis_scripts
from kvstore.directory import ENTRY_TTL_S, DirectoryReader, DirectoryWriter, WorkerRecord, holder_name
from kvstore.keys import PageKey, pack_keys
from kvstore.redis_url import HELP, RedisUrl, aclose, redacted
from protos import errors

_CALLS = 8  # of one router at once, each on a connection of its own
_TURN_S = 5.0  # to wait for one of them; who has less time gives up earlier
log = logging.getLogger(__name__)


class RedisDirectoryReader(DirectoryReader):
    """The router's side. `cluster` is the prefix of every key. Raises `MetadataUnavailable` for an unusable URL."""

    def __init__(self, url: str, cluster: str, *, entry_ttl_s: float = ENTRY_TTL_S) -> None:
        self._url = url
        self._keys = _Keys(cluster)
        self._entry_ttl_ms = int(entry_ttl_s * 1000)
        self._calls = asyncio.Semaphore(_CALLS)
        with _url_errors():
            # Once again at once: a connection that Redis closed when it restarted shows that only when used.
            # Not after a timeout: a request waits for this.
            self._redis = RedisUrl.parse(url).async_client(retries=1)
        self._lookup = self._redis.register_script(redis_scripts.LOOKUP)
        self._workers = self._redis.register_script(redis_scripts.WORKERS)

    async def workers(self) -> list[WorkerRecord]:
        async with self._turn():
            packed = await self._workers(keys=self._keys.workers())
        return list(_readable(packed))

    async def lookup(self, keys: Sequence[PageKey]) -> dict[str, int]:
        if not keys:
            return {}
        async with self._turn():
            flat = await self._lookup(keys=[self._keys.family(keys[0])], args=[pack_keys(keys), self._entry_ttl_ms])
        return {holder.decode(): length for holder, length in zip(flat[::2], flat[1::2], strict=True)}

    async def ping(self) -> None:
        async with self._turn():
            await self._redis.exists(self._keys.workers()[0])  # in a cluster, asks the node that matters

    async def aclose(self) -> None:
        await aclose(self._redis)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The right to one call; its errors typed."""
        with _redis_errors(self._url):
            async with asyncio.timeout(_TURN_S) if self._calls.locked() else nullcontext():
                await self._calls.acquire()
            try:
                yield
            finally:
                self._calls.release()


class RedisDirectoryWriter(DirectoryWriter):
    """The worker's side. `cluster` is the prefix of every key. Raises `MetadataUnavailable` for an unusable URL."""

    def __init__(self, url: str, cluster: str, *, entry_ttl_s: float = ENTRY_TTL_S) -> None:
        self._url = url
        self._keys = _Keys(cluster)
        self._entry_ttl_ms = int(entry_ttl_s * 1000)
        with _url_errors():
            parsed = RedisUrl.parse(url)
        with _redis_errors(url):
            # No retry here: whoever announces has a backoff of its own, and has to see each outage.
            self._redis = parsed.client(retries=0)
        self._renew = self._redis.register_script(redis_scripts.RENEW)
        self._publish = self._redis.register_script(redis_scripts.PUBLISH)
        self._withdraw = self._redis.register_script(redis_scripts.WITHDRAW)

    def renew(self, record: WorkerRecord, ttl_s: float) -> bool:
        with _redis_errors(self._url):
            lease_ms = int(ttl_s * 1000)
            return bool(self._renew(keys=self._keys.workers(), args=[record.holder, record.pack(), lease_ms]))

    def publish(self, holder: str, family: PageKey, keys: Sequence[PageKey]) -> None:
        with _redis_errors(self._url):
            self._publish(keys=[self._keys.family(family)], args=[holder, pack_keys(keys), self._entry_ttl_ms])

    def withdraw(self, holder: str, family: PageKey, keys: Sequence[PageKey]) -> None:
        with _redis_errors(self._url):
            self._withdraw(keys=[self._keys.family(family)], args=[holder, pack_keys(keys)])

    def deregister(self, worker_id: str, incarnation: int) -> None:
        holder = holder_name(worker_id, incarnation)
        records, leases = self._keys.workers()
        with _redis_errors(self._url):
            self._redis.zrem(leases, holder)
            self._redis.hdel(records, holder)

    def close(self) -> None:
        self._redis.close()


class _Keys:
    """Names in Redis. What stands in braces decides the slot in a Redis Cluster."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster

    def workers(self) -> list[str]:
        """The hash of records and the sorted set of leases."""
        return [f"{{{self._cluster}}}:workers", f"{{{self._cluster}}}:leases"]

    def family(self, first: PageKey) -> str:
        return f"{self._cluster}:pages:{{{first.hex()}}}"


@contextmanager
def _url_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, redis.RedisError):
        # Its words may hold a piece of the password, where that has a character that URLs must escape.
        raise errors.MetadataUnavailable(
            f"the Redis URL cannot be used: write {HELP}, and special characters of the password escaped (%23 for #)",
            stage="directory",
        ) from None


@contextmanager
def _redis_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, RedisClusterException, OSError) as error:
        raise errors.MetadataUnavailable(
            f"Redis at {redacted(url)} does not answer: {type(error).__name__}: {error}", stage="directory"
        ) from error


def _readable(packed: Sequence[bytes]) -> Iterator[WorkerRecord]:
    for data in packed:
        try:
            yield WorkerRecord.unpack(data)
        except ValueError as error:
            log.warning("passed over a worker: %s", error)

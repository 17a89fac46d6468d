"""The directory in Redis or Valkey, by a redis://, rediss:// or unix:// URL."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore import redis_scripts
from kvstore.directory import ENTRY_TTL_S, DirectoryReader, DirectoryWriter, WorkerRecord, holder_name
from kvstore.keys import PageKey, pack_keys
from protos import errors

_CONNECTIONS = 8  # of one router
_TIMEOUT_S = 1.0  # to connect, and for an answer
log = logging.getLogger(__name__)


class RedisDirectoryReader(DirectoryReader):
    """The router's side. `cluster` is the prefix of every key. Raises `MetadataUnavailable` for an unusable URL."""

    def __init__(self, url: str, cluster: str, *, entry_ttl_s: float = ENTRY_TTL_S) -> None:
        self._url = url
        self._keys = _Keys(cluster)
        self._entry_ttl_ms = int(entry_ttl_s * 1000)
        with _url_errors():
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=_TIMEOUT_S,
                # Once again at once: a connection that Redis closed when it restarted shows that only when used.
                # Not after a timeout: a request waits for this.
                retry=AsyncRetry(NoBackoff(), 1, (redis.ConnectionError,)),
                **_timeouts(),
            )
        self._redis = redis.asyncio.Redis.from_pool(pool)
        self._lookup = self._redis.register_script(redis_scripts.LOOKUP)
        self._workers = self._redis.register_script(redis_scripts.WORKERS)

    async def workers(self) -> list[WorkerRecord]:
        with _redis_errors(self._url):
            packed = await self._workers(keys=self._keys.workers())
        return list(_readable(packed))

    async def lookup(self, keys: Sequence[PageKey]) -> dict[str, int]:
        if not keys:
            return {}
        with _redis_errors(self._url):
            flat = await self._lookup(keys=[self._keys.family(keys[0])], args=[pack_keys(keys), self._entry_ttl_ms])
        return {holder.decode(): length for holder, length in zip(flat[::2], flat[1::2], strict=True)}

    async def ping(self) -> None:
        with _redis_errors(self._url):
            await self._redis.ping()

    async def aclose(self) -> None:
        await self._redis.aclose()


class RedisDirectoryWriter(DirectoryWriter):
    """The worker's side. `cluster` is the prefix of every key. Raises `MetadataUnavailable` for an unusable URL."""

    def __init__(self, url: str, cluster: str, *, entry_ttl_s: float = ENTRY_TTL_S) -> None:
        self._url = url
        self._keys = _Keys(cluster)
        self._entry_ttl_ms = int(entry_ttl_s * 1000)
        with _url_errors():
            # No retry here: whoever announces has a backoff of its own, and has to see each outage.
            self._redis = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **_timeouts())
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


def redacted(url: str) -> str:
    """The URL without user, password and options, fit for logs and messages."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return f"unix://{parts.path}"
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}:{parts.port or 6379}"
    except ValueError:
        return "the Redis URL"


def _timeouts() -> dict[str, Any]:
    return {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S}


@contextmanager
def _url_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, redis.RedisError):
        # Its words may hold a piece of the password, where that has a character that URLs must escape.
        raise errors.MetadataUnavailable(
            "the Redis URL cannot be used: write redis://[:password@]host:port, rediss://... or unix:///path,"
            " with special characters of the password escaped (%23 for #)",
            stage="directory",
        ) from None


@contextmanager
def _redis_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise errors.MetadataUnavailable(
            f"Redis at {redacted(url)} does not answer: {type(error).__name__}: {error}", stage="directory"
        ) from error


def _readable(packed: Sequence[bytes]) -> Iterator[WorkerRecord]:
    for data in packed:
        try:
            yield WorkerRecord.unpack(data)
        except ValueError as error:
            log.warning("passed over a worker: %s", error)

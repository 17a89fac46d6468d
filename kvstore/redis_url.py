"""Redis or Valkey by URL: one server, the master that Sentinels name, or a Redis Cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
import redis.asyncio
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelPool
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

HELP = (
    "redis://[:PASSWORD@]HOST:PORT, unix:///PATH, redis+sentinel://[:PASSWORD@]HOST:PORT,HOST:PORT/SERVICE or"
    " redis+cluster://[:PASSWORD@]HOST:PORT,HOST:PORT; with rediss in place of redis for TLS"
)
_PORTS = {"server": 6379, "sentinel": 26379, "cluster": 6379}
_SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}
_TIMEOUT_S = 1.0  # to connect, and for an answer
_TIMEOUTS: Mapping[str, Any] = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S}

Client = redis.Redis | RedisCluster
AsyncClient = redis.asyncio.Redis | AsyncRedisCluster


@dataclass(frozen=True)
class RedisUrl:
    """What a URL says. Nothing is connected before a client is first used, but for a cluster's blocking client."""

    kind: Literal["server", "sentinel", "cluster"]
    url: str = field(repr=False)
    service: str = ""  # the master's name, as Sentinels know it
    nodes: tuple[tuple[str, int], ...] = ()  # Sentinels, or some of a cluster's nodes
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of connections to a cluster or a master
    sentinel_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # to a Sentinel

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises `ValueError`, whose words may hold a piece of the password."""
        parts = urlsplit(url)
        scheme, _, kind = parts.scheme.partition("+")
        if not kind:
            parse_url(url)
            return cls("server", url)
        if scheme not in ("redis", "rediss") or kind not in ("sentinel", "cluster"):
            raise ValueError(f"no such scheme: {parts.scheme}")
        credentials, at, hosts = parts.netloc.rpartition("@")
        query = dict(parse_qsl(parts.query))
        sentinel = {name: query.pop(given) for given, name in _SENTINEL_OPTIONS.items() if given in query}
        service, _, db = parts.path.strip("/").partition("/")
        if bool(service) != (kind == "sentinel"):
            raise ValueError("a path /SERVICE is for Sentinels, who need it")
        options = parse_url(f"{scheme}://{credentials}{at}one/{db}?{urlencode(query)}")
        del options["host"]
        tls = {name: value for name, value in options.items() if name.startswith("ssl")}
        if options.pop("connection_class", None) is not None:
            tls["ssl"] = options["ssl"] = True
        return cls(
            kind=kind,  # type: ignore[arg-type]  # checked above
            url=url,
            service=service,
            nodes=tuple(_node(host, _PORTS[kind]) for host in hosts.split(",")),
            options=options,
            sentinel_options=sentinel | tls,
        )

    def client(self, retries: int) -> Client:
        """For threads. Tries again at once, `retries` times, where a connection proves to be closed.

        Raises what redis-py raises where a cluster does not answer.
        """
        settings = dict(_TIMEOUTS, retry=Retry(NoBackoff(), retries, (redis.ConnectionError,)))
        if self.kind == "cluster":
            nodes = [ClusterNode(host, port) for host, port in self.nodes]
            return RedisCluster(startup_nodes=nodes, **(settings | dict(self.options)))
        if self.kind == "sentinel":
            sentinels = Sentinel(self.nodes, sentinel_kwargs=settings | dict(self.sentinel_options))
            master: redis.Redis = sentinels.master_for(self.service, **(settings | dict(self.options)))
            return master
        return redis.Redis.from_url(self.url, **settings)

    def async_client(self, retries: int) -> AsyncClient:
        """As `client`, for asyncio; to be closed with `aclose`."""
        settings = dict(_TIMEOUTS, retry=AsyncRetry(NoBackoff(), retries, (redis.ConnectionError,)))
        if self.kind == "cluster":
            nodes = [AsyncClusterNode(host, port) for host, port in self.nodes]
            return AsyncRedisCluster(startup_nodes=nodes, **(settings | dict(self.options)))
        if self.kind == "sentinel":
            sentinels = AsyncSentinel(self.nodes, sentinel_kwargs=settings | dict(self.sentinel_options))
            master: redis.asyncio.Redis = sentinels.master_for(self.service, **(settings | dict(self.options)))
            return master
        return redis.asyncio.Redis.from_url(self.url, **settings)


async def aclose(client: AsyncClient) -> None:
    """Close a client's connections, those to Sentinels as well."""
    await client.aclose()
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, AsyncSentinelPool):
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def redacted(url: str) -> str:
    """The URL without user, password and options, fit for logs and messages."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return f"unix://{parts.path}"
        hosts = parts.netloc.rpartition("@")[2].split(",")
        port = _PORTS[parts.scheme.partition("+")[2] or "server"]
        nodes = [_node(host, port) for host in hosts]
    except (ValueError, KeyError):
        return "the Redis URL"
    shown = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in nodes)
    return f"{parts.scheme}://{shown}"


def _node(text: str, default_port: int) -> tuple[str, int]:
    """Host and port. Raises `ValueError`."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a host is missing")
    return parts.hostname, parts.port or default_port

"""Every kind of URL against real servers: TLS, Sentinels whose master dies, a Redis Cluster that loses a node."""

import asyncio
import contextlib
import logging
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvstore.announcer import Announcer
from kvstore.directory import WorkerRecord
from kvstore.keys import PageKey
from kvstore.page_format import PageFormat
from kvstore.redis_directory import RedisDirectoryReader, RedisDirectoryWriter
from kvstore.redis_url import RedisUrl, redacted
from kvstore.valkey import EmbeddedValkey
from protos import errors
from valkey_servers import PASSWORD, Server, cluster, eventually, join

RECORD = WorkerRecord("w", 1, "prefill", "a:1", "m", "f", PageFormat(1, 1, 16, 8, "float32"), 64, ())
PROMPTS = [[PageKey(bytes([first, page]) * 8) for page in range(40)] for first in range(12)]
PATIENCE_S = 20.0


async def becomes(check) -> None:
    """Wait until an async check is true; a directory that does not answer is not there yet."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(errors.MetadataUnavailable):
            if await check():
                return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def directory(url: str) -> AsyncIterator[tuple[RedisDirectoryReader, RedisDirectoryWriter]]:
    reader, writer = RedisDirectoryReader(url, "c"), await asyncio.to_thread(RedisDirectoryWriter, url, "c")
    try:
        yield reader, writer
    finally:
        await reader.aclose()
        writer.close()


# URLs.


def test_sentinels_by_url():
    url = RedisUrl.parse(
        "rediss+sentinel://u:p%23w@one,[::1]:7000/main/3?sentinel_password=spw&ssl_ca_certs=/ca.pem&ssl_cert_reqs=none"
    )
    tls = {"ssl": True, "ssl_ca_certs": "/ca.pem", "ssl_cert_reqs": "none"}
    assert (url.kind, url.service, url.nodes) == ("sentinel", "main", (("one", 26379), ("::1", 7000)))
    assert url.options == {"username": "u", "password": "p#w", "db": 3} | tls
    assert url.sentinel_options == {"password": "spw"} | tls  # the servers' password is none of theirs
    assert "p#w" not in repr(url)
    assert "spw" not in repr(url)


def test_a_cluster_by_url():
    url = RedisUrl.parse("redis+cluster://:pw@one:7000,two")
    assert (url.kind, url.nodes) == ("cluster", (("one", 7000), ("two", 6379)))
    assert url.options == {"password": "pw"}


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://:s3cr3t@one:1",  # no service
        "redis+cluster://:s3cr3t@one:1/service",
        "redis+cluster://:s3cr3t@one:port",
        "redis+cluster://:s3cr3t@",
        "redis+cluster://:s3cr3t@one,,two",
        "redis+tower://:s3cr3t@one:1",
        "http+cluster://:s3cr3t@one:1",
    ],
)
def test_a_url_that_says_too_little_or_too_much_is_refused_without_its_password(url):
    for make in (RedisDirectoryReader, RedisDirectoryWriter):
        with pytest.raises(errors.MetadataUnavailable, match="cannot be used") as caught:
            make(url, "c")
        assert "s3cr3t" not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:pass@host:7000/1?x=pass", "redis://host:7000"),
        ("rediss://:pass@host", "rediss://host:6379"),
        ("redis://:pass@[::1]:7000", "redis://[::1]:7000"),
        ("unix://user:pass@/run/valkey.sock?db=1", "unix:///run/valkey.sock"),
        ("redis+sentinel://:pass@a,b:7/main?sentinel_password=pass", "redis+sentinel://a:26379,b:7"),
        ("rediss+cluster://u:pass@a,[::1]:7", "rediss+cluster://a:6379,[::1]:7"),
        ("redis://:pa#ss@host:6379", "the Redis URL"),
        ("redis+tower://:pass@host:6379", "the Redis URL"),
    ],
)
def test_redacted(url, shown):
    assert redacted(url) == shown


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """One file: a key and its self-signed certificate for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the program openssl makes the certificate, and is not here")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    whose = "-subj /CN=diptych -addext subjectAltName=IP:127.0.0.1 -days 2"
    command = [openssl, *f"req -x509 {key} {whose} -keyout - -out -".split()]
    path.write_bytes(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)
    return path


@contextlib.asynccontextmanager
async def tls_before(server: EmbeddedValkey, certificate: Path) -> AsyncIterator[int]:
    """A port where TLS ends in front of the server, for the binary that we ship has none of its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    pipes: set[asyncio.Task[None]] = set()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(server.url.removeprefix("unix://"))
        ends = asyncio.gather(pipe(reader, inner_writer), pipe(inner_reader, writer))
        pipes.add(asyncio.ensure_future(ends))
        await ends

    listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await asyncio.wait(pipes, timeout=5)


async def test_tls_with_a_certificate_that_is_trusted(certificate):
    with EmbeddedValkey() as server:
        async with tls_before(server, certificate) as port:
            url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}"
            async with directory(url) as (reader, writer):
                await asyncio.to_thread(writer.publish, "w/1", PROMPTS[0][0], PROMPTS[0])
                assert await reader.lookup(PROMPTS[0]) == {"w/1": 40}
            async with directory(f"rediss://127.0.0.1:{port}") as (reader, _):  # nobody vouches for it
                with pytest.raises(errors.MetadataUnavailable, match="certificate"):
                    await reader.lookup(PROMPTS[0])


# Sentinels.


@pytest.fixture
def watched(tmp_path) -> Iterator[tuple[Server, Server, Server]]:
    """A master, its replica, and the Sentinel that watches them and has a password of its own."""
    auth = (f"requirepass {PASSWORD}", f"masterauth {PASSWORD}", "repl-diskless-sync-delay 0")
    with ExitStack() as stack:
        master = stack.enter_context(Server(tmp_path, *auth))
        replica = stack.enter_context(Server(tmp_path, *auth, f"replicaof 127.0.0.1 {master.port}"))
        eventually(lambda: replica.call("INFO", "replication")["master_link_status"] == "up")
        watch = (
            f"sentinel monitor main 127.0.0.1 {master.port} 1",
            f"sentinel auth-pass main {PASSWORD}",
            "sentinel down-after-milliseconds main 300",
            "sentinel failover-timeout main 3000",
            f"requirepass {PASSWORD}",
        )
        sentinel = stack.enter_context(Server(tmp_path, *watch, sentinel=True))
        eventually(lambda: str(replica.port) in str(sentinel.call("SENTINEL", "REPLICAS", "main")))
        yield master, replica, sentinel


async def test_a_new_master_is_found_and_told_everything_again(watched, caplog):
    caplog.set_level(logging.WARNING)
    master, replica, sentinel = watched
    url = f"redis+sentinel://:{PASSWORD}@127.0.0.1:1,127.0.0.1:{sentinel.port}/main?sentinel_password={PASSWORD}"
    async with directory(url) as (reader, writer):
        announcer = Announcer(writer, lambda: RECORD, period_s=0.2)
        announcer.start()
        try:
            for key in PROMPTS[0][:3]:
                announcer.sealed(PROMPTS[0][0], key)
            await becomes(lambda: _holds(reader, 3))
            master.kill()
            with pytest.raises(errors.MetadataUnavailable) as caught:  # as long as nobody is promoted
                await reader.lookup(PROMPTS[0])
            assert PASSWORD not in str(caught.value)
            announcer.sealed(PROMPTS[0][0], PROMPTS[0][3])
            await becomes(lambda: _holds(reader, 4))
            assert replica.call("INFO", "replication")["role"] == "master"
            assert await reader.workers() == [RECORD]
            assert "the directory is back: announcing 4 pages" in caplog.text
        finally:
            await asyncio.to_thread(announcer.stop)
    assert PASSWORD not in caplog.text


async def _holds(reader: RedisDirectoryReader, pages: int) -> bool:
    return await reader.lookup(PROMPTS[0]) == {RECORD.holder: pages}


# A Redis Cluster.


async def test_a_cluster_shares_the_prompts_out_and_loses_no_more_than_a_node(tmp_path):
    with ExitStack() as stack:
        nodes = [stack.enter_context(server) for server in cluster(tmp_path, "cluster-require-full-coverage no")]
        await asyncio.to_thread(join, nodes)
        url = f"redis+cluster://:{PASSWORD}@127.0.0.1:{nodes[1].port},127.0.0.1:{nodes[2].port}"
        async with directory(url) as (reader, writer):
            assert writer.renew(RECORD, 60.0)
            for prompt in PROMPTS:
                writer.publish("w/1", prompt[0], prompt)
            assert all(node.call("DBSIZE") for node in nodes)
            assert [await reader.lookup(prompt) for prompt in PROMPTS] == [{"w/1": 40}] * len(PROMPTS)
            assert await reader.workers() == [RECORD]

            on_first = {str(key) for key in nodes[0].call("KEYS", "c:pages:*")}
            nodes[0].kill()
            for prompt in PROMPTS:
                if f"c:pages:{{{prompt[0].hex()}}}" in on_first:
                    with pytest.raises(errors.MetadataUnavailable, match=r"redis\+cluster://127") as caught:
                        await reader.lookup(prompt)
                    assert PASSWORD not in str(caught.value)
                    lost = prompt
                else:
                    assert await reader.lookup(prompt) == {"w/1": 40}

            await asyncio.to_thread(nodes[0].start)  # empty
            await becomes(lambda: _tell(writer, lost))
            assert await reader.lookup(lost) == {"w/1": 40}


async def _tell(writer: RedisDirectoryWriter, prompt: list[PageKey]) -> bool:
    await asyncio.to_thread(writer.publish, "w/1", prompt[0], prompt)
    return True


async def test_a_cluster_that_is_not_there_is_a_typed_error():
    url = f"redis+cluster://:{PASSWORD}@127.0.0.1:1"
    reader = RedisDirectoryReader(url, "c")
    with pytest.raises(errors.MetadataUnavailable, match="does not answer") as caught:
        await reader.lookup(PROMPTS[0])
    assert PASSWORD not in str(caught.value)
    await reader.aclose()
    with pytest.raises(errors.MetadataUnavailable, match="does not answer"):
        RedisDirectoryWriter(url, "c")

"""What only the directory in Redis must do: one round trip, typed errors without secrets, a server that goes away."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import redis
from redis.asyncio.connection import AbstractConnection

from kvstore import redis_scripts
from kvstore.directory import WorkerRecord
from kvstore.keys import PageKey
from kvstore.page_format import PageFormat
from kvstore.redis_directory import RedisDirectoryReader, RedisDirectoryWriter
from kvstore.valkey import EmbeddedValkey
from protos import errors

PROMPT = [PageKey(i.to_bytes(16, "big")) for i in range(3000)]
RECORD = WorkerRecord("w", 1, "prefill", "a:1", "m", "f", PageFormat(1, 1, 16, 8, "float32"), 64, ())


@pytest.fixture
def valkey() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
async def reader(valkey: EmbeddedValkey) -> AsyncIterator[RedisDirectoryReader]:
    reader = RedisDirectoryReader(valkey.url, "c")
    yield reader
    await reader.aclose()


@pytest.fixture
def writer(valkey: EmbeddedValkey) -> Iterator[RedisDirectoryWriter]:
    writer = RedisDirectoryWriter(valkey.url, "c")
    yield writer
    writer.close()


async def test_a_lookup_is_one_round_trip_whatever_the_length(reader, writer, monkeypatch):
    writer.publish("w/1", PROMPT[0], PROMPT)
    await reader.lookup(PROMPT[:1])  # connects, and loads the script once in a server's life
    sent = []
    send = AbstractConnection.send_packed_command

    async def count(self: AbstractConnection, command: object, check_health: bool = True) -> None:
        sent.append(command)
        await send(self, command, check_health)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", count)
    for n in (1, 100, 3000):
        sent.clear()
        assert await reader.lookup(PROMPT[:n]) == {"w/1": n}
        assert len(sent) == 1


async def test_a_lookup_stops_at_the_first_miss(reader, writer, valkey):
    writer.publish("w/1", PROMPT[0], PROMPT[:5])
    await reader.lookup(PROMPT[:1])
    with redis.Redis.from_url(valkey.url) as client:
        before = client.info("commandstats")["cmdstat_hmget"]["calls"]
        assert await reader.lookup(PROMPT) == {"w/1": 5}
        assert client.info("commandstats")["cmdstat_hmget"]["calls"] - before == 1


async def test_keys_bear_the_clusters_name_and_a_family_has_one_slot(reader, writer, valkey):
    writer.renew(RECORD, 30.0)
    writer.publish("w/1", PROMPT[0], PROMPT)
    with redis.Redis.from_url(valkey.url) as client:
        assert sorted(client.keys()) == [b"c:pages:{%s}" % PROMPT[0].hex().encode(), b"{c}:leases", b"{c}:workers"]
        assert client.pttl(f"c:pages:{{{PROMPT[0].hex()}}}") > 3_500_000  # an hour
    other = RedisDirectoryReader(valkey.url, "another")
    assert await other.lookup(PROMPT) == {}
    assert await other.workers() == []
    await other.aclose()


async def test_a_record_that_cannot_be_read_is_passed_over(reader, writer, valkey, caplog):
    writer.renew(RECORD, 30.0)
    with redis.Redis.from_url(valkey.url) as client:
        client.hset("{c}:workers", "bad/1", b"\xc1")
        client.zadd("{c}:leases", {"bad/1": time.time() * 1000 + 30_000})
    assert await reader.workers() == [RECORD]
    assert "passed over a worker" in caplog.text


async def test_many_lookups_at_once_share_a_few_connections(reader, writer, valkey):
    writer.publish("w/1", PROMPT[0], PROMPT[:10])
    answers = await asyncio.gather(*(reader.lookup(PROMPT[:10]) for _ in range(200)))
    assert answers == [{"w/1": 10}] * 200
    with redis.Redis.from_url(valkey.url) as client:
        assert client.info("clients")["connected_clients"] <= 10


async def test_a_server_that_went_and_came_back_empty(reader, writer, valkey):
    writer.renew(RECORD, 30.0)
    writer.publish("w/1", PROMPT[0], PROMPT[:10])
    assert await reader.lookup(PROMPT[:10]) == {"w/1": 10}
    valkey.stop()
    for call in (reader.lookup(PROMPT), reader.workers(), reader.ping()):
        with pytest.raises(errors.MetadataUnavailable, match=r"valkey\.sock"):
            await call
    with pytest.raises(errors.MetadataUnavailable):
        writer.renew(RECORD, 30.0)
    valkey.start()
    assert await reader.lookup(PROMPT) == {}
    assert writer.renew(RECORD, 30.0) is True
    writer.publish("w/1", PROMPT[0], PROMPT[:10])
    assert await reader.lookup(PROMPT[:10]) == {"w/1": 10}


async def test_a_restart_between_two_lookups_is_not_noticed(reader, valkey):
    assert await reader.lookup(PROMPT) == {}
    valkey.stop()
    valkey.start()
    assert await reader.lookup(PROMPT) == {}


async def test_a_server_that_does_not_move_is_given_up_in_time(reader, valkey):
    await reader.ping()
    os.kill(valkey.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(errors.MetadataUnavailable):
        await reader.lookup(PROMPT)
    os.kill(valkey.pid, signal.SIGCONT)
    assert time.monotonic() - started < 2.5  # a retry would have waited for longer


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        f"http://:{SECRET}@localhost",
        f"redis://:{SECRET}@localhost:port",
        f"redis://:{SECRET}#x@localhost:6379",
        f"redis://:{SECRET}/x@localhost:6379",
        f"redis://:{SECRET}@localhost:6379?socket_timeout={SECRET}",
    ],
)
def test_a_url_that_cannot_be_used_is_a_typed_error_without_the_password(url):
    for make in (RedisDirectoryReader, RedisDirectoryWriter):
        with pytest.raises(errors.MetadataUnavailable, match="redis://") as caught:
            make(url, "c")
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is None


async def test_a_refused_connection_is_a_typed_error_without_the_password():
    url = f"redis://user:{SECRET}@127.0.0.1:1/0"
    reader, writer = RedisDirectoryReader(url, "c"), RedisDirectoryWriter(url, "c")
    with pytest.raises(errors.MetadataUnavailable, match=r"redis://127\.0\.0\.1:1 ") as caught:
        await reader.lookup(PROMPT)
    assert SECRET not in str(caught.value)
    with pytest.raises(errors.MetadataUnavailable) as caught:
        writer.renew(RECORD, 1.0)
    assert SECRET not in str(caught.value)
    await reader.aclose()
    writer.close()


async def test_a_wrong_password_is_a_typed_error_that_does_not_tell_it():
    with EmbeddedValkey("127.0.0.1", password="right") as server:
        reader = RedisDirectoryReader(server.url.replace("right", SECRET), "c")
        with pytest.raises(errors.MetadataUnavailable, match="password") as caught:
            await reader.ping()
        assert SECRET not in str(caught.value)
        await reader.aclose()
        reader = RedisDirectoryReader(server.url, "c")
        await reader.ping()
        await reader.aclose()


def test_every_script_has_a_legend():
    scripts = [value for name, value in vars(redis_scripts).items() if name.isupper()]
    assert len(scripts) == 5
    assert all("-- KEYS[1]" in script for script in scripts)

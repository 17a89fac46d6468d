"""One suite for the directory in memory, in a real Valkey and in a real cluster of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace

import msgpack
import pytest

from kvstore.directory import DirectoryReader, DirectoryWriter, WorkerRecord
from kvstore.keys import PageKey
from kvstore.memory_directory import MemoryDirectory
from kvstore.page_format import PageFormat
from kvstore.redis_directory import RedisDirectoryReader, RedisDirectoryWriter
from kvstore.valkey import EmbeddedValkey
from valkey_servers import PASSWORD, cluster, join

RECORD = WorkerRecord(
    worker_id="prefill-0",
    incarnation=2**63 - 1,
    pool="prefill",
    address="127.0.0.1:5000",
    model="m",
    fingerprint="f",
    format=PageFormat(2, 2, 16, 8, "float32"),
    max_tokens=2048,
    endpoints=(("shm", "/proc/1/fd/3"), ("tcp", "127.0.0.1:6000")),
    draining=False,
    load={"running": 3, "step_ms": 1.5},
)
PATIENCE_S = 10.0


def keys(n: int, start: int = 0) -> list[PageKey]:
    # Bytes that a careless encoding would trip over: zeros, newlines, 0xff.
    return [PageKey(b"\n\x00\xff" + i.to_bytes(13, "big")) for i in range(start, start + n)]


@dataclass
class Directory:
    reader: DirectoryReader
    writer: DirectoryWriter

    async def lookup(self, keys: list[PageKey]) -> dict[str, int]:
        return await self.reader.lookup(keys)


@pytest.fixture(scope="module")
def valkey() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture(scope="module")
def valkey_url(valkey: EmbeddedValkey) -> str:
    return valkey.url


@pytest.fixture(scope="module")
def cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ExitStack() as stack:
        nodes = [stack.enter_context(node) for node in cluster(tmp_path_factory.mktemp("cluster"))]
        join(nodes)
        yield f"redis+cluster://:{PASSWORD}@127.0.0.1:{nodes[0].port}"


@pytest.fixture(params=["memory", "valkey", "cluster"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Directory]]:
    """Makes directories; each with an entry_ttl_s of its own, and empty."""
    stack = AsyncExitStack()

    def make(entry_ttl_s: float = 60.0) -> Directory:
        if request.param == "memory":
            directory = MemoryDirectory(entry_ttl_s)
            return Directory(directory, directory)
        url = request.getfixturevalue(f"{request.param}_url")
        name = f"test-{time.monotonic_ns()}"
        reader = RedisDirectoryReader(url, name, entry_ttl_s=entry_ttl_s)
        writer = RedisDirectoryWriter(url, name, entry_ttl_s=entry_ttl_s)
        stack.push_async_callback(reader.aclose)
        stack.callback(writer.close)
        return Directory(reader, writer)

    async with stack:
        yield make


@pytest.fixture
def directory(make: Callable[..., Directory]) -> Directory:
    return make()


async def becomes(check: Callable[[], object]) -> bool:
    """Whether an async check comes true in time."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if await check():
            return True
        await asyncio.sleep(0.02)
    return False


# Pages.


async def test_lookup_tells_each_holders_leading_run(directory):
    prompt = keys(6)
    directory.writer.publish("all/1", prompt[0], prompt)
    directory.writer.publish("three/1", prompt[0], prompt[:3])
    directory.writer.publish("hole/1", prompt[0], prompt[:2] + prompt[3:])
    directory.writer.publish("tail/1", prompt[0], prompt[1:])
    assert await directory.lookup(prompt) == {"all/1": 6, "three/1": 3, "hole/1": 2}
    assert await directory.lookup(prompt[:2]) == {"all/1": 2, "three/1": 2, "hole/1": 2}
    assert await directory.lookup([*prompt[:4], *keys(3, start=100)]) == {"all/1": 4, "three/1": 3, "hole/1": 2}


async def test_a_miss_at_first_and_no_keys_at_all(directory):
    directory.writer.publish("a/1", keys(1)[0], keys(4))
    assert await directory.lookup(keys(4, start=50)) == {}
    assert await directory.lookup([]) == {}


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40, 41, 700, 5000])
async def test_runs_of_every_length(directory, n):
    prompt = keys(n + 1)
    directory.writer.publish("short/1", prompt[0], prompt[: n // 2])
    directory.writer.publish("long/1", prompt[0], prompt[:n])
    expected = {"long/1": n} | ({"short/1": n // 2} if n // 2 else {})
    assert await directory.lookup(prompt[:n]) == expected
    assert await directory.lookup(prompt) == expected


async def test_holders_change_along_the_way(directory):
    prompt = keys(100)
    for n in range(1, 11):
        directory.writer.publish(f"w{n}/1", prompt[0], prompt[: n * 10])
    assert await directory.lookup(prompt) == {f"w{n}/1": n * 10 for n in range(1, 11)}


async def test_publishing_twice_is_as_once(directory):
    prompt = keys(3)
    for holder in ("a/1", "a/1", "aa/1", "a/11"):
        directory.writer.publish(holder, prompt[0], prompt)
    directory.writer.withdraw("a/1", prompt[0], prompt)
    assert await directory.lookup(prompt) == {"aa/1": 3, "a/11": 3}


async def test_withdraw_takes_one_holder_from_the_pages_it_names(directory):
    prompt = keys(4)
    directory.writer.publish("a/1", prompt[0], prompt)
    directory.writer.publish("b/1", prompt[0], prompt)
    directory.writer.withdraw("a/1", prompt[0], prompt[2:])
    assert await directory.lookup(prompt) == {"a/1": 2, "b/1": 4}
    directory.writer.withdraw("b/1", prompt[0], prompt)
    directory.writer.withdraw("a/1", prompt[0], prompt[:1])
    assert await directory.lookup(prompt) == {}
    directory.writer.withdraw("a/1", prompt[0], prompt)  # what is not there
    assert await directory.lookup(prompt) == {}


async def test_prompts_that_share_their_first_page_share_a_family(directory):
    shared, one, other = keys(2), keys(2, start=10), keys(2, start=20)
    directory.writer.publish("a/1", shared[0], [*shared, *one])
    directory.writer.publish("b/1", shared[0], [*shared, *other])
    assert await directory.lookup([*shared, *one]) == {"a/1": 4, "b/1": 2}
    assert await directory.lookup([*shared, *other]) == {"a/1": 2, "b/1": 4}


async def test_what_is_neither_told_nor_found_is_forgotten(make):
    directory = make(entry_ttl_s=0.1)
    prompt = keys(3)
    directory.writer.publish("a/1", prompt[0], prompt)
    await asyncio.sleep(0.3)
    assert await directory.lookup(prompt) == {}


async def test_what_is_found_or_told_again_stays(make):
    directory = make(entry_ttl_s=1.5)
    prompt, other = keys(3), keys(3, start=10)
    directory.writer.publish("a/1", prompt[0], prompt)
    directory.writer.publish("a/1", other[0], other)
    for _ in range(6):  # 2.1 s in all
        await asyncio.sleep(0.35)
        assert await directory.lookup(prompt) == {"a/1": 3}
        directory.writer.publish("a/1", other[0], other[:1])
    assert await directory.lookup(other) == {"a/1": 3}


# Workers.


async def test_a_worker_is_listed_as_it_told(directory):
    assert await directory.reader.workers() == []
    assert directory.writer.renew(RECORD, 30.0) is True
    assert directory.writer.renew(RECORD, 30.0) is False
    assert await directory.reader.workers() == [RECORD]
    later = replace(RECORD, draining=True, load={"running": 0})
    directory.writer.renew(later, 30.0)
    assert await directory.reader.workers() == [later]


async def test_two_lives_of_a_worker_are_two_entries(directory):
    second = replace(RECORD, incarnation=5, address="127.0.0.1:5001")
    directory.writer.renew(RECORD, 30.0)
    assert directory.writer.renew(second, 30.0) is True
    assert {record.incarnation for record in await directory.reader.workers()} == {RECORD.incarnation, 5}
    directory.writer.deregister(RECORD.worker_id, RECORD.incarnation)
    directory.writer.deregister(RECORD.worker_id, RECORD.incarnation)
    assert await directory.reader.workers() == [second]


async def test_a_lease_ends_and_its_worker_is_unknown_again(directory):
    other = replace(RECORD, worker_id="other")
    directory.writer.renew(other, 60.0)
    directory.writer.renew(RECORD, 0.1)

    async def only_the_other() -> bool:
        return await directory.reader.workers() == [other]

    assert await becomes(only_the_other)
    assert directory.writer.renew(RECORD, 30.0) is True
    assert len(await directory.reader.workers()) == 2


async def test_ping(directory):
    await directory.reader.ping()


# Records.


def test_a_record_as_msgpack_and_back():
    assert WorkerRecord.unpack(RECORD.pack()) == RECORD
    assert RECORD.holder == f"prefill-0/{2**63 - 1}"


def test_a_record_of_a_newer_version_is_read():
    raw = msgpack.unpackb(RECORD.pack()) | {"new_field": 1}
    assert WorkerRecord.unpack(msgpack.packb(raw)) == RECORD


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03", b"noise", RECORD.pack()[:-3]])
def test_what_is_no_record_is_a_value_error(data):
    with pytest.raises(ValueError, match="no worker record"):
        WorkerRecord.unpack(data)

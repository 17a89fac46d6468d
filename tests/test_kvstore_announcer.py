"""The announcer: a lease that is kept, pages that are told and taken back, outages that are survived."""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import pytest

from kvstore import announcer as module
from kvstore.announcer import Announcer
from kvstore.directory import WorkerRecord
from kvstore.keys import PageKey
from kvstore.memory_directory import MemoryDirectory
from kvstore.page_format import PageFormat
from kvstore.redis_directory import RedisDirectoryReader, RedisDirectoryWriter
from kvstore.valkey import EmbeddedValkey
from protos import errors

RECORD = WorkerRecord("w", 1, "prefill", "a:1", "m", "f", PageFormat(1, 1, 16, 8, "float32"), 64, ())
PROMPT = [PageKey(i.to_bytes(16, "big")) for i in range(2000)]
PATIENCE_S = 20.0


class Flaky(MemoryDirectory):
    """A directory that can be lost, with or without what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.down = threading.Event()
        self.calls = 0

    def _call(self) -> None:
        self.calls += 1
        if self.down.is_set():
            raise errors.MetadataUnavailable("down for the test")

    def renew(self, record: WorkerRecord, ttl_s: float) -> bool:
        self._call()
        return super().renew(record, ttl_s)

    def publish(self, holder: str, family: PageKey, keys) -> None:
        self._call()
        super().publish(holder, family, keys)

    def withdraw(self, holder: str, family: PageKey, keys) -> None:
        self._call()
        super().withdraw(holder, family, keys)

    def deregister(self, worker_id: str, incarnation: int) -> None:
        self._call()
        super().deregister(worker_id, incarnation)

    def lose_everything(self) -> None:
        with self._lock:
            self._workers, self._families, self._expiry = {}, {}, {}


@pytest.fixture
def directory() -> Flaky:
    return Flaky()


@pytest.fixture
def announcer(directory: Flaky) -> Iterator[Announcer]:
    announcer = Announcer(directory, lambda: RECORD, ttl_s=1.5, period_s=0.1)
    yield announcer
    announcer.stop()


async def becomes(check: Callable[[], Awaitable[bool]]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if await check():
            return True
        await asyncio.sleep(0.01)
    return False


async def run_is(directory, n: int) -> bool:
    async def check() -> bool:
        try:
            return await directory.lookup(PROMPT) == ({"w/1": n} if n else {})
        except errors.MetadataUnavailable:
            return False

    return await becomes(check)


async def is_listed(directory, *records: WorkerRecord) -> bool:
    async def check() -> bool:
        try:
            return await directory.workers() == list(records)
        except errors.MetadataUnavailable:
            return False

    return await becomes(check)


async def test_it_registers_renews_and_leaves(directory, announcer):
    announcer.start()
    assert await is_listed(directory, RECORD)
    for _ in range(20):  # for longer than a lease
        await asyncio.sleep(0.1)
        assert await directory.workers() == [RECORD]
    announcer.stop()
    announcer.stop()
    assert await directory.workers() == []
    assert not [thread for thread in threading.enumerate() if thread.name == "announcer"]


async def test_each_renewal_tells_the_record_as_it_is_now(directory):
    record = [RECORD]
    announcer = Announcer(directory, lambda: record[0], ttl_s=5.0, period_s=0.05)
    announcer.start()
    assert await is_listed(directory, RECORD)
    record[0] = replace(RECORD, draining=True, load={"running": 7})
    assert await is_listed(directory, record[0])
    announcer.stop()


async def test_pages_are_told_and_taken_back(directory, announcer):
    announcer.start()
    for key in PROMPT[:3]:
        announcer.sealed(PROMPT[0], key)
    assert await run_is(directory, 3)
    announcer.evicted(PROMPT[2])
    assert await run_is(directory, 2)
    announcer.sealed(PROMPT[0], PROMPT[2])
    assert await run_is(directory, 3)


async def test_what_was_sealed_before_the_start_is_told(directory, announcer):
    announcer.sealed(PROMPT[0], PROMPT[0])
    announcer.start()
    assert await run_is(directory, 1)


async def test_sealed_and_evicted_in_quick_turns_end_as_they_ended(directory, announcer):
    announcer.start()
    for _ in range(300):
        announcer.sealed(PROMPT[0], PROMPT[0])
        announcer.sealed(PROMPT[0], PROMPT[1])
        announcer.evicted(PROMPT[1])
        announcer.evicted(PROMPT[0])
        announcer.sealed(PROMPT[0], PROMPT[0])
    assert await run_is(directory, 1)
    announcer.evicted(PROMPT[0])
    assert await run_is(directory, 0)


async def test_an_evicted_key_that_was_never_sealed_is_passed_over(directory, announcer):
    announcer.evicted(PROMPT[0])
    announcer.start()
    announcer.sealed(PROMPT[0], PROMPT[0])
    assert await run_is(directory, 1)


async def test_leaving_takes_the_pages_along(directory, announcer):
    announcer.start()
    for key in PROMPT[:5]:
        announcer.sealed(PROMPT[0], key)
    assert await run_is(directory, 5)
    announcer.stop()
    assert await directory.lookup(PROMPT) == {}


async def test_a_directory_that_lost_everything_is_told_everything(directory, announcer):
    announcer.start()
    for key in PROMPT:
        announcer.sealed(PROMPT[0], key)
    assert await run_is(directory, len(PROMPT))
    directory.lose_everything()
    assert await run_is(directory, len(PROMPT))
    assert await is_listed(directory, RECORD)


async def test_an_outage_is_logged_once_and_all_that_changed_is_told_after_it(directory, announcer, caplog):
    caplog.set_level(logging.INFO)
    announcer.start()
    for key in PROMPT[:3]:
        announcer.sealed(PROMPT[0], key)
    assert await run_is(directory, 3)
    directory.down.set()
    announcer.evicted(PROMPT[2])  # the directory keeps what it had: this must be told once it is back
    calls = directory.calls
    assert await becomes(lambda: asyncio.sleep(0, directory.calls > calls + 5))
    announcer.sealed(PROMPT[0], PROMPT[3])
    directory.down.clear()
    assert await run_is(directory, 2)
    announcer.sealed(PROMPT[0], PROMPT[2])
    assert await run_is(directory, 4)
    assert caplog.text.count("the directory is lost: down for the test") == 1
    assert caplog.text.count("the directory is back") == 1


async def test_a_directory_that_is_away_at_the_start_is_waited_for(directory, announcer):
    directory.down.set()
    announcer.sealed(PROMPT[0], PROMPT[0])
    announcer.start()
    assert await becomes(lambda: asyncio.sleep(0, directory.calls > 2))
    directory.down.clear()
    assert await is_listed(directory, RECORD)
    assert await run_is(directory, 1)


async def test_withdrawals_that_wait_are_bounded(directory, announcer, monkeypatch):
    monkeypatch.setattr(module, "_MAX_WITHDRAWALS", 10)
    directory.down.set()
    announcer.start()
    for key in PROMPT[:100]:
        announcer.sealed(PROMPT[0], key)
        announcer.evicted(key)
    assert len(announcer._withdraw) == 10


async def test_many_pages_do_not_keep_the_lease_from_being_renewed(directory, monkeypatch):
    """Telling is cut into batches with a look at the lease between them."""
    slow = directory.publish

    def publish(holder: str, family: PageKey, keys) -> None:
        time.sleep(0.05)
        slow(holder, family, keys)

    monkeypatch.setattr(directory, "publish", publish)
    monkeypatch.setattr(module, "_BATCH", 50)
    announcer = Announcer(directory, lambda: RECORD, ttl_s=1.5, period_s=0.1)
    for key in PROMPT:  # 40 batches: 2 s
        announcer.sealed(PROMPT[0], key)
    announcer.start()
    assert await is_listed(directory, RECORD)
    while await directory.lookup(PROMPT) != {"w/1": len(PROMPT)}:
        assert await directory.workers() == [RECORD]
        await asyncio.sleep(0.02)
    announcer.stop()


async def test_a_valkey_killed_and_started_again_hears_everything():
    with EmbeddedValkey() as valkey:
        reader, writer = RedisDirectoryReader(valkey.url, "c"), RedisDirectoryWriter(valkey.url, "c")
        announcer = Announcer(writer, lambda: RECORD, ttl_s=2.0, period_s=0.1)
        announcer.start()
        for key in PROMPT:
            announcer.sealed(PROMPT[0], key)
        assert await run_is(reader, len(PROMPT))
        os.kill(valkey.pid, signal.SIGKILL)
        valkey.stop()
        announcer.evicted(PROMPT[-1])
        await asyncio.sleep(0.3)
        valkey.start()
        assert await run_is(reader, len(PROMPT) - 1)
        assert await is_listed(reader, RECORD)
        announcer.stop()
        assert await reader.workers() == []
        assert await reader.lookup(PROMPT) == {}
        await reader.aclose()
        writer.close()


async def test_stopping_while_the_directory_is_away_ends_soon(directory, announcer, caplog):
    announcer.start()
    assert await is_listed(directory, RECORD)
    directory.down.set()
    announcer.stop()
    assert "left without telling the directory" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name == "announcer"]

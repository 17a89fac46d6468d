"""Which workers a router knows: those that the directory lists, those that live, those that fit together."""

import asyncio
import logging
from dataclasses import replace

import pytest
import pytest_asyncio

from fake_worker import FORMAT, FakeWorker
from kvstore.memory_directory import MemoryDirectory
from protos import errors
from router import fleet as fleet_module
from router import worker_link
from router.fleet import Fleet, describe
from router_rig import until


class Directory(MemoryDirectory):
    """One that can be down."""

    down = False

    async def workers(self):
        if self.down:
            raise errors.MetadataUnavailable("it sleeps")
        return await super().workers()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(fleet_module, "POLL_S", 0.05)
    monkeypatch.setattr(worker_link, "PROBE_S", 0.3)


@pytest_asyncio.fixture
async def world():
    """A directory, a started fleet, and a way to start workers."""
    directory, workers = Directory(), []
    fleet = Fleet(directory, "r0")
    await fleet.start()

    async def add(pool, index=0, **record):
        workers.append(await FakeWorker(pool, directory, worker_id=f"{pool}-{index}", **record).start())
        return workers[-1]

    yield directory, fleet, add
    await fleet.stop()
    await asyncio.gather(*(worker.die() for worker in workers))


def names(links):
    return sorted(link.record.worker_id for link in links)


async def test_a_directory_that_does_not_answer_at_start_is_told():
    directory = Directory()
    directory.down = True
    with pytest.raises(errors.MetadataUnavailable):
        await Fleet(directory, "r0").start()


async def test_workers_are_found_by_pool(world):
    _, fleet, add = world
    await add("prefill")
    await add("decode", 0)
    await add("decode", 1)
    await until(lambda: len(fleet.usable("prefill")) == 1 and len(fleet.usable("decode")) == 2)
    assert names(fleet.usable("decode")) == ["decode-0", "decode-1"]


async def test_draining_workers_are_known_but_not_used(world):
    _, fleet, add = world
    worker = await add("decode")
    await until(lambda: fleet.usable("decode"))
    worker.announce(draining=True)
    await until(lambda: not fleet.usable("decode"))
    assert describe(fleet, "decode") == "1 known, 1 connected, 1 draining"


async def test_a_dead_worker_is_not_used_and_forgotten_with_its_lease(world):
    _, fleet, add = world
    worker = await add("decode")
    await until(lambda: fleet.usable("decode"))
    await worker.die()
    await until(lambda: not fleet.usable("decode"), within_s=2.0)
    assert len(fleet.links) == 1
    worker.lose_lease()
    await until(lambda: not fleet.links)


async def test_a_frozen_worker_is_given_up_when_its_lease_ends(world):
    _, fleet, add = world
    worker = await add("decode")
    await until(lambda: fleet.usable("decode"))
    worker.frozen = True
    await asyncio.sleep(0.2)
    assert fleet.usable("decode")
    worker.lose_lease()
    await until(lambda: not fleet.links)


async def test_a_frozen_worker_does_not_keep_new_ones_from_being_found(world, monkeypatch):
    monkeypatch.setattr(worker_link, "PROBE_S", 60.0)
    _, fleet, add = world
    frozen = await add("decode", 0)
    await until(lambda: fleet.usable("decode"))
    frozen.frozen = True
    frozen.lose_lease()
    await until(lambda: fleet._doubts)
    await add("decode", 1)
    await until(lambda: names(fleet.usable("decode")) == ["decode-1"])


async def test_a_new_life_under_the_same_name_has_a_link_of_its_own(world):
    _, fleet, add = world
    first = await add("decode")
    await until(lambda: fleet.usable("decode"))
    second = await add("decode")
    await until(lambda: len(fleet.usable("decode")) == 2)
    await first.die()
    first.lose_lease()
    await until(lambda: len(fleet.links) == 1)
    assert fleet.usable("decode")[0].record.incarnation == second.record.incarnation


async def test_a_worker_that_left_the_directory_finishes_what_it_has_and_gets_nothing_new(world):
    _, fleet, add = world
    leaving = await add("decode", 0)
    await add("decode", 1)
    await until(lambda: len(fleet.usable("decode")) == 2)
    leaving.lose_lease()
    await until(lambda: names(fleet.usable("decode")) == ["decode-1"])
    await asyncio.sleep(0.2)
    assert [link.live for link in fleet.links.values()] == [True, True]


async def test_a_restarted_directory_that_knows_nobody_costs_no_worker(world):
    _, fleet, add = world
    worker = await add("decode")
    await until(lambda: fleet.usable("decode"))
    (link,) = fleet.usable("decode")
    worker.lose_lease()  # as far as the directory knows
    await asyncio.sleep(0.5)
    assert fleet.usable("decode") == [link]
    worker.announce()
    await asyncio.sleep(0.2)
    assert fleet.usable("decode") == [link]


async def test_workers_stay_while_the_directory_is_down_and_it_is_logged_once(world, caplog):
    directory, fleet, add = world
    await add("decode")
    await until(lambda: fleet.usable("decode"))
    caplog.set_level(logging.INFO, "router.fleet")
    directory.down = True
    await until(lambda: not fleet.directory_up)
    await asyncio.sleep(0.3)
    assert fleet.usable("decode")
    directory.down = False
    await until(lambda: fleet.directory_up)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@pytest.mark.parametrize(
    "odd", [{"fingerprint": "other weights"}, {"format": replace(FORMAT, page_size=64)}], ids=["weights", "format"]
)
async def test_a_worker_that_differs_from_most_is_left_out_and_logged_once(world, caplog, odd):
    _, fleet, add = world
    await add("prefill")
    await add("decode", 0)
    await add("decode", 1, **odd)
    await until(lambda: len([link for link in fleet.links.values() if link.live]) == 3)
    assert names(fleet.usable("decode")) == ["decode-0"]
    await until(lambda: [r for r in caplog.records if r.levelname == "ERROR"])
    await asyncio.sleep(0.2)
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "decode-1" in record.getMessage()
    assert ("page_size 16 against 64" if "format" in odd else "other weights") in record.getMessage()


async def test_page_stores_are_holders_and_no_workers(world):
    directory, fleet, add = world
    worker = await add("decode")
    record = replace(worker.record, worker_id="store-0", pool="store", address="10.0.0.9:1")
    directory.renew(record, 3600.0)
    await until(lambda: len(fleet.holders()) == 2)
    assert fleet.holders() == {worker.record.holder: worker.record, record.holder: record}
    assert names(fleet.links.values()) == ["decode-0"]
    assert fleet.usable("store") == []
    worker.lose_lease()  # the directory has lost the workers, and knows a store already
    await asyncio.sleep(0.2)
    assert names(fleet.usable("decode")) == ["decode-0"]
    directory.deregister("store-0", record.incarnation)
    await until(lambda: record.holder not in fleet.holders())


async def test_a_worker_that_drains_is_still_a_holder_and_one_that_is_lost_is_not(world):
    _, fleet, add = world
    worker, other = await add("prefill", 0), await add("prefill", 1)
    await until(lambda: len(fleet.holders()) == 2)
    worker.announce(draining=True)
    await until(lambda: names(fleet.usable("prefill")) == ["prefill-1"])
    assert worker.record.holder in fleet.holders()
    await worker.die()
    await until(lambda: list(fleet.holders()) == [other.record.holder])


async def test_stopping_closes_every_link(world):
    _, fleet, add = world
    worker = await add("decode")
    await until(lambda: fleet.usable("decode"))
    await fleet.stop()
    await until(lambda: not worker._steps)
    assert not fleet.links

"""One stream to one life of a worker: opened, broken, opened again, given up."""

import asyncio
from dataclasses import replace

import pytest
import pytest_asyncio

from fake_worker import FakeWorker, never
from kvstore.memory_directory import MemoryDirectory
from protos import errors
from protos.v1 import worker_pb2
from router import worker_link
from router.worker_link import Claim, WorkerLink
from router_rig import until


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.updates: list[worker_pb2.SequenceUpdate] = []
        self.losses: list[errors.DiptychError] = []

    def update(self, pool, update):
        assert pool == "prefill"
        self.updates.append(update)

    def lost(self, pool, error):
        assert pool == "prefill"
        self.losses.append(error)


@pytest_asyncio.fixture
async def worker():
    worker = await FakeWorker("prefill", MemoryDirectory()).start()
    worker.script = never
    yield worker
    await worker.die()


@pytest_asyncio.fixture
async def link(worker):
    link = WorkerLink(worker.record, "r0")
    await until(lambda: link.live)
    yield link
    await link.stop("is left")


def prefill(wire_id):
    return worker_pb2.RouterMessage(prefill=worker_pb2.Prefill(request_id=wire_id))


def claim(listener):
    return Claim(listener, tokens=10, pages=1)


async def test_it_says_who_it_is_and_hears_who_the_worker_is(worker, link):
    assert (await worker.hears("hello")).router_id == "r0"
    assert link.description.worker_id == worker.record.worker_id


async def test_updates_reach_the_request_that_they_are_for(worker, link):
    first, second = Heard(), Heard()
    link.listen("a#1", claim(first))
    link.listen("b#1", claim(second))
    await worker.say("b#1", token_ids=[7])
    await worker.say("nobody", token_ids=[8])
    await worker.say("a#1", token_ids=[9])
    await until(lambda: first.updates)
    assert [list(u.token_ids) for u in first.updates] == [[9]]
    assert [list(u.token_ids) for u in second.updates] == [[7]]


def step(token):
    return worker_pb2.Step(updates=[worker_pb2.SequenceUpdate(request_id="a", token_ids=[token])])


def told(listener):
    return [token for update in listener.updates for token in update.token_ids]


async def test_steps_that_come_while_the_last_is_passed_on_gather(link):
    """The first is passed on at once, the others together once those who heard it have had their turn."""
    listener = Heard()
    link.listen("a", claim(listener))
    for token in range(3):
        link._hear(step(token))
    assert told(listener) == [0]
    turns = []
    asyncio.get_running_loop().call_soon(lambda: turns.append(told(listener)))
    await until(lambda: len(told(listener)) == 3)
    assert told(listener) == [0, 1, 2]
    assert turns == [[0]]
    await until(lambda: link._resting is None)
    link._hear(step(3))
    assert told(listener) == [0, 1, 2, 3]


async def test_what_had_gathered_is_passed_on_before_a_loss(worker, link):
    listener = Heard()
    link.listen("a", claim(listener))
    link._hear(step(0))
    link._resting.cancel()  # it would not end in time
    link._hear(step(1))
    await worker.die()
    await until(lambda: listener.losses)
    assert told(listener) == [0, 1]


async def test_a_forgotten_request_hears_no_more(worker, link):
    gone, here = Heard(), Heard()
    link.listen("a", claim(gone))
    link.listen("b", claim(here))
    link.forget("a")
    link.forget("a")
    await worker.say("a", token_ids=[7])
    await worker.say("b", token_ids=[8])
    await until(lambda: here.updates)
    assert not gone.updates


async def test_messages_arrive_in_order(worker, link):
    for index in range(200):
        link.send(prefill(str(index)))
    await worker.hears("prefill", 200)
    assert [m.request_id for m in worker.said("prefill")] == [str(index) for index in range(200)]


async def test_a_load_comes_with_each_step(worker, link):
    before = link.step_load.at
    worker.load.tokens_per_s = 77.0
    await worker.say("nobody")
    await until(lambda: link.step_load.load.tokens_per_s == 77.0)
    assert link.step_load.at > before


async def test_a_dead_worker_is_told_to_all_who_listen_within_two_seconds(worker, link):
    heard = [Heard() for _ in range(3)]
    for index, listener in enumerate(heard):
        link.listen(str(index), claim(listener))
    await worker.die()
    await until(lambda: all(listener.losses for listener in heard), within_s=2.0)
    assert not link.live
    assert not link.claims
    for listener in heard:
        (error,) = listener.losses
        assert isinstance(error, errors.WorkerLost)
        assert error.stage == "prefill"
    assert heard[0].losses[0] is not heard[1].losses[0]  # each request adds its own id


async def test_nothing_can_be_asked_of_a_worker_that_is_not_there(worker, link):
    await worker.die()
    await until(lambda: not link.live)
    with pytest.raises(errors.WorkerLost):
        link.listen("a", claim(Heard()))
    link.send(prefill("a"))  # dropped


async def test_it_connects_again_and_nothing_old_is_sent(worker, link):
    address = worker.record.address
    await worker.die()
    await until(lambda: not link.live)
    again = FakeWorker("prefill", MemoryDirectory(), incarnation=worker.record.incarnation)
    again.script = never
    again.port = int(address.rsplit(":", 1)[1])
    await again.start()
    try:
        await until(lambda: link.live)
        link.listen("new", claim(Heard()))
        link.send(prefill("new"))
        await again.hears("prefill")
        assert [m.request_id for m in again.said("prefill")] == ["new"]
    finally:
        await again.die()


async def test_another_life_at_the_same_address_is_not_taken_for_this_one(worker):
    link = WorkerLink(replace(worker.record, incarnation=987), "r0")
    await worker.hears("hello")
    await asyncio.sleep(0.1)
    assert not link.live
    assert not await link.probe()
    await link.stop("is left")


async def test_a_probe_tells_the_living_from_the_frozen(worker, link, monkeypatch):
    monkeypatch.setattr(worker_link, "PROBE_S", 0.2)
    assert await link.probe()
    worker.frozen = True
    assert not await link.probe()


async def test_a_worker_that_does_not_read_is_given_up(worker, link, monkeypatch):
    heard = Heard()
    link.listen("a", claim(heard))
    for index in range(worker_link.OUTBOX_MESSAGES + 2):
        link.send(prefill(str(index)))  # without a pause: nothing can be written between
    await until(lambda: heard.losses)
    assert "does not read" in heard.losses[0].message
    await until(lambda: link.live)  # and it is tried again
    link.send(prefill("new"))
    await until(lambda: "new" in [message.request_id for message in worker.said("prefill")])
    assert len(worker.said("prefill")) < 100, "what was meant for the old stream was sent on the new one"


async def test_a_frozen_worker_is_not_waited_for_when_opening(worker, monkeypatch):
    monkeypatch.setattr(worker_link, "CONNECT_S", 0.2)
    worker.frozen = True
    link = WorkerLink(worker.record, "r0")
    await worker.hears("hello", 2)  # it has tried again
    assert not link.live
    worker.frozen = False
    await until(lambda: link.live)
    await link.stop("is left")


async def test_stopping_tells_who_listens(worker, link):
    heard = Heard()
    link.listen("a", claim(heard))
    await link.stop("is left behind")
    assert "is left behind" in heard.losses[0].message

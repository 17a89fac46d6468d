"""Pulls beside the engine: in order, with their event, and nothing kept of an owner that is gone."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from kvstore.keys import PageKey
from kvstore.segment import Segment
from kvstore.transports.shm import ShmReader
from kvstore_owner import SMALL, Owner
from protos import errors
from protos.v1 import worker_pb2, worker_pb2_grpc
from worker import puller as puller_module
from worker.pull_rates import PullRates
from worker.puller import Pulled, Puller

PATIENCE_S = 20.0


@pytest.fixture
def local() -> Iterator[Segment]:
    segment = Segment.create(SMALL, 8, incarnation=1)
    yield segment
    segment.close()


@pytest.fixture(scope="module")
def only_owner() -> Iterator[Owner]:
    with Owner() as owner:
        yield owner


@pytest.fixture
def owner(only_owner: Owner) -> Owner:
    """One that all tests share, with all pages free."""
    only_owner.reset()
    return only_owner


@pytest.fixture
def mortal() -> Iterator[Owner]:
    """One that the test may kill."""
    with Owner() as owner:
        yield owner


@pytest.fixture
def puller(local: Segment) -> Iterator[Puller]:
    puller = Puller(local, ["shm", "tcp"], post=lambda command: command())
    yield puller
    puller.close()


def pull(puller: Puller, source: worker_pb2.PageSource, refs: list[tuple[int, int]], into: list[int]) -> Pulled:
    ended: list[Pulled] = []
    event = threading.Event()

    def done(result: Pulled) -> None:
        ended.append(result)
        event.set()

    messages = [worker_pb2.PageRef(page=page, generation=generation) for page, generation in refs]
    puller.pull(source, messages, into, PATIENCE_S, done)
    assert event.wait(PATIENCE_S)
    return ended[0]


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def maps_of_segments() -> int:
    return len(re.findall("diptych-pages", Path("/proc/self/maps").read_text()))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_pull_tells_what_it_moved(puller, owner, local, transport):
    result = pull(puller, owner.source(transport), owner.fill(7, 8), [3, 1])
    assert (result.pages, result.bytes, result.transport, result.error) == (2, 2 * SMALL.page_bytes, transport, None)
    assert local.pages[[3, 1], 0].tolist() == [7, 8]


def test_the_rate_of_pulls_is_known_by_transport_but_for_what_connecting_took(puller, owner):
    refs = owner.fill(7, 8)
    pull(puller, owner.source("shm"), refs, [3, 1])
    assert puller.rates.by_transport == {}
    ms = pull(puller, owner.source("shm"), refs, [3, 1]).ms
    assert puller.rates.by_transport == pytest.approx({"shm": 2 * SMALL.page_bytes / ms * 1e3})


def test_large_pulls_decide_what_the_rate_is_and_old_ones_fade():
    rates = PullRates()
    for _ in range(50):
        rates.add("cuda_ipc", 8 << 20, 0.5e-3)  # mostly its start
        rates.add("cuda_ipc", 512 << 20, 1.5e-3)
    assert rates.by_transport["cuda_ipc"] == pytest.approx((512 << 20) / 1.5e-3, rel=0.02)
    for _ in range(200):
        rates.add("cuda_ipc", 512 << 20, 15e-3)
    assert rates.by_transport["cuda_ipc"] == pytest.approx((512 << 20) / 15e-3, rel=0.02)
    rates.add("shm", 0, 0.0)
    assert "shm" not in rates.by_transport


def test_what_fails_is_told(puller, mortal):
    [ref] = mortal.fill(7)
    mortal.rewrite(ref[0], 8)
    assert isinstance(pull(puller, mortal.source("shm"), [ref], [0]).error, errors.StalePage)
    mortal.kill()
    assert isinstance(pull(puller, mortal.source("shm"), [ref], [0]).error, errors.WorkerLost)


def test_every_pull_goes_behind_what_the_engine_had_launched_when_it_was_asked_for(owner, local, monkeypatch):
    launched = [object(), object()]
    seen = []
    copy = ShmReader._copy

    def note(self, refs, into, timeout_s, after):
        seen.append(after)
        return copy(self, refs, into, timeout_s, after)

    monkeypatch.setattr(ShmReader, "_copy", note)
    events = iter(launched)
    puller = Puller(local, ["shm"], lambda command: command(), launched=lambda: next(events))
    refs = owner.fill(7)
    for _ in launched:
        pull(puller, owner.source("shm"), refs, [0])
    assert seen == launched
    puller.close()


def test_nothing_is_kept_of_an_owner_that_is_gone(puller, mortal):
    before = maps_of_segments()
    pull(puller, mortal.source("shm"), mortal.fill(7), [0])
    puller.close_idle(time.monotonic())
    assert maps_of_segments() == before + 1
    mortal.kill()
    puller.close_idle(time.monotonic() + 2)
    assert eventually(lambda: maps_of_segments() == before)


def test_a_connection_that_is_not_used_is_let_go(puller, owner):
    before = maps_of_segments()
    refs = owner.fill(7)
    pull(puller, owner.source("shm"), refs, [0])
    puller.close_idle(time.monotonic() + 60)
    assert eventually(lambda: maps_of_segments() == before)
    assert pull(puller, owner.source("shm"), refs, [0]).error is None


class Holder(worker_pb2_grpc.PageHolderServicer):
    """Says of the first keys that these are their pages, after a while."""

    def __init__(self) -> None:
        self.refs: list[tuple[int, int]] = []
        self.first_index = 0
        self.pause_s = 0.0
        self.asked: list[bytes] = []

    def Locate(self, request, context):
        self.asked.append(request.page_keys)
        time.sleep(self.pause_s)
        refs = enumerate(self.refs, self.first_index)
        return worker_pb2.LocateResponse(
            pages=[worker_pb2.PageRef(index=i, page=p, generation=g) for i, (p, g) in refs]
        )


@dataclass
class Waiting:
    """What waits for a fetch."""

    wanted: bool = True
    batches: list[int] = field(default_factory=list)
    result: Pulled | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def arrived(self, count: int) -> None:
        assert self.result is None
        self.batches.append(count)

    def ended(self, result: Pulled) -> None:
        self.result = result
        self.over.set()


@pytest.fixture
def holder() -> Iterator[Holder]:
    server = grpc.server(ThreadPoolExecutor(2))
    holder = Holder()
    worker_pb2_grpc.add_PageHolderServicer_to_server(holder, server)
    holder.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield holder
    server.stop(0).wait()


KEYS = [PageKey(bytes([n] * 16)) for n in range(4)]


def fetch(puller: Puller, owner: Owner, address: str, timeout_s=PATIENCE_S, by: Waiting | None = None) -> Waiting:
    by = by or Waiting()
    order = worker_pb2.Fetch(source=owner.source("shm"), address=address, pages=len(KEYS))
    puller.fetch(order, KEYS, [5, 3, 1, 0], timeout_s, by)
    assert by.over.wait(PATIENCE_S)
    return by


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_fetch_asks_where_the_pages_are_and_copies_them_in_batches(puller, owner, local, holder, monkeypatch, batch):
    monkeypatch.setattr(puller_module, "_BATCH_BYTES", batch * SMALL.page_bytes)
    holder.refs = owner.fill(7, 8, 9, 10)
    by = fetch(puller, owner, holder.address)
    assert holder.asked == [b"".join(KEYS)]
    assert by.batches == {1: [1, 1, 1, 1], 3: [3, 1], 64: [4]}[batch]
    assert local.pages[[5, 3, 1, 0], 0].tolist() == [7, 8, 9, 10]
    result = by.result
    assert (result.pages, result.bytes, result.transport, result.error) == (4, 4 * SMALL.page_bytes, "shm", None)


def test_a_short_run_is_copied_as_far_as_it_goes(puller, owner, local, holder):
    holder.refs = owner.fill(7)
    assert fetch(puller, owner, holder.address).batches == [1]
    holder.refs = []
    by = fetch(puller, owner, holder.address)
    assert (by.batches, by.result.pages, by.result.error) == ([], 0, None)


def test_a_stale_page_ends_a_fetch_behind_the_batches_before_it(puller, owner, holder, monkeypatch):
    monkeypatch.setattr(puller_module, "_BATCH_BYTES", SMALL.page_bytes)
    holder.refs = owner.fill(7, 8, 9)
    owner.rewrite(holder.refs[1][0], 99)
    by = fetch(puller, owner, holder.address)
    assert by.batches == [1]
    assert isinstance(by.result.error, errors.StalePage)


def test_a_holder_that_says_nothing_costs_no_more_than_its_time(puller, owner, holder):
    holder.pause_s = 1.0
    began = time.monotonic()
    by = fetch(puller, owner, holder.address, timeout_s=0.1)
    assert time.monotonic() - began < 0.9
    assert isinstance(by.result.error, errors.DeadlineExceeded)


def test_closing_does_not_wait_for_a_holder_that_says_nothing(puller, owner, holder):
    holder.pause_s = 3.0
    by = Waiting()
    puller.fetch(worker_pb2.Fetch(source=owner.source("shm"), address=holder.address), KEYS, [5, 3, 1, 0], 60.0, by)
    assert eventually(lambda: holder.asked)
    began = time.monotonic()
    puller.close()
    assert time.monotonic() - began < 2.0
    assert by.result.pages == 0
    assert by.result.error is not None


def test_the_time_runs_while_earlier_pulls_do(puller, owner, holder):
    """The second fetch's time is over when the first one, which is slow, lets it go; then it asks for nothing."""
    holder.refs, holder.pause_s = owner.fill(7), 0.3
    first = Waiting()
    order = worker_pb2.Fetch(source=owner.source("shm"), address=holder.address, pages=1)
    puller.fetch(order, KEYS, [5, 3, 1, 0], PATIENCE_S, first)
    second = fetch(puller, owner, holder.address, timeout_s=0.05)
    assert first.result.pages == 1
    assert isinstance(second.result.error, errors.DeadlineExceeded)
    assert len(holder.asked) == 1


def test_nobody_at_the_holders_address_is_told(puller, owner):
    assert isinstance(fetch(puller, owner, "127.0.0.1:1").result.error, errors.WorkerLost)


def test_a_dead_holder_is_told_and_one_that_nobody_waits_for_is_not_copied_from(puller, mortal, holder):
    holder.refs = mortal.fill(7)
    assert fetch(puller, mortal, holder.address, by=Waiting(wanted=False)).result.pages == 0
    mortal.kill()
    assert isinstance(fetch(puller, mortal, holder.address).result.error, errors.WorkerLost)


def test_pages_that_were_not_asked_for_are_refused(puller, owner, holder):
    holder.refs, holder.first_index = owner.fill(7), 1
    by = fetch(puller, owner, holder.address)
    assert by.batches == []
    assert "not asked for" in str(by.result.error)

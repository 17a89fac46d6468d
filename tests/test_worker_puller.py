"""Pulls beside the engine: in order, with their event, and nothing kept of an owner that is gone."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.segment import Segment
from kvstore.transports.shm import ShmReader
from kvstore_owner import SMALL, Owner
from protos import errors
from protos.v1 import worker_pb2
from worker.puller import Pulled, Puller

PATIENCE_S = 20.0


@pytest.fixture
def local() -> Iterator[Segment]:
    segment = Segment.create(SMALL, 8, incarnation=1)
    yield segment
    segment.close()


@pytest.fixture
def owner() -> Iterator[Owner]:
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


def test_what_fails_is_told(puller, owner):
    [ref] = owner.fill(7)
    owner.rewrite(ref[0], 8)
    assert isinstance(pull(puller, owner.source("shm"), [ref], [0]).error, errors.StalePage)
    owner.kill()
    assert isinstance(pull(puller, owner.source("shm"), [ref], [0]).error, errors.WorkerLost)


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


def test_nothing_is_kept_of_an_owner_that_is_gone(puller, owner):
    before = maps_of_segments()
    pull(puller, owner.source("shm"), owner.fill(7), [0])
    puller.close_idle(time.monotonic())
    assert maps_of_segments() == before + 1
    owner.kill()
    puller.close_idle(time.monotonic() + 2)
    assert eventually(lambda: maps_of_segments() == before)


def test_a_connection_that_is_not_used_is_let_go(puller, owner):
    before = maps_of_segments()
    refs = owner.fill(7)
    pull(puller, owner.source("shm"), refs, [0])
    puller.close_idle(time.monotonic() + 60)
    assert eventually(lambda: maps_of_segments() == before)
    assert pull(puller, owner.source("shm"), refs, [0]).error is None

"""A role without model, network or threads: the engine's runner and the puller are scripted."""

from dataclasses import dataclass

from engine.answer_lengths import Expectation
from engine.config import EngineConfig
from engine.engine import Done, Engine
from engine.scheduler import Scheduler
from kvstore.keys import PageKey, pack_keys, pack_tokens, page_keys
from kvstore.pool import PageId, PagePool
from protos.errors import DiptychError
from protos.v1 import common_pb2, worker_pb2
from worker.puller import Fetching, Pulled
from worker.role import is_idle

ROOT = PageKey(bytes(16))
PAGE = 4


class CountingRunner:
    """Samples 1000, 1001, ... for each sequence by its length, so every token is known beforehand."""

    def __init__(self, behind: int = 0) -> None:
        self.behind = behind
        self.fail: Exception | None = None

    def launch(self, chunks) -> Done:
        if self.fail:
            raise self.fail
        return Done([1000 + c.sequence.unread + len(c.sequence.tokens) for c in chunks if c.is_last])


class ScriptedPuller:
    """Keeps every pull until `finish`, and every fetch for the test to tell what became of it."""

    def __init__(self) -> None:
        self.pulls: list = []
        self.fetches: list[ScriptedFetch] = []
        self.closed = False

    def pull(self, source, refs, into, timeout_s, done) -> None:
        self.pulls.append((list(refs), list(into), done))

    def finish(self, error=None) -> None:
        refs, _, done = self.pulls.pop(0)
        done(Pulled(len(refs), 100 * len(refs), 1.5, "shm", error))

    def fetch(self, order, keys, into, timeout_s, by) -> None:
        self.fetches.append(ScriptedFetch(order, list(keys), list(into), timeout_s, by))

    def close_idle(self, now) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@dataclass
class ScriptedFetch:
    """What the puller was asked for."""

    order: worker_pb2.Fetch
    keys: list[PageKey]
    into: list[PageId]
    timeout_s: float
    by: Fetching
    arrived: int = 0

    def arrive(self, count: int) -> None:
        self.arrived += count
        self.by.arrived(count)

    def end(self, error: DiptychError | None = None) -> None:
        self.by.ended(Pulled(self.arrived, 100 * self.arrived, 1.5, "shm", error))


def make_engine(num_pages=16, lengths: Expectation | None = None, **config) -> tuple[Engine, CountingRunner]:
    settings = {"page_size": PAGE, "num_pages": num_pages, "token_budget": 8, "max_sequences": 4, "max_waiting": 4}
    scheduler = Scheduler(PagePool(num_pages), EngineConfig(**(settings | config)), lengths=lengths)
    runner = CountingRunner()
    return Engine(scheduler, runner), runner


def request(kind, request_id, tokens, max_tokens=8, deadline_s=60.0, end_ids=(), **extra):
    """A RouterMessage of the kind `prefill` or `decode`."""
    tokens = list(tokens)
    body = {
        "request_id": request_id,
        "token_ids": pack_tokens(tokens),
        "page_keys": pack_keys(page_keys(ROOT, tokens, PAGE)),
        "root_key": ROOT,
        "sampling": common_pb2.SamplingParams(max_tokens=max_tokens),
        "end_token_ids": end_ids,
        "deadline_s": deadline_s,
    } | extra
    message = worker_pb2.Prefill(**body) if kind == "prefill" else worker_pb2.Decode(**body)
    return worker_pb2.RouterMessage(**{kind: message})


def cancel(request_id):
    return worker_pb2.RouterMessage(cancel=worker_pb2.Cancel(request_id=request_id))


def release(request_id):
    return worker_pb2.RouterMessage(release=worker_pb2.Release(request_id=request_id))


def updates(role, router="r") -> list[worker_pb2.SequenceUpdate]:
    """What the role has emitted for a router since the last call."""
    return role.take_updates().get(router, [])


def assert_empty(role) -> None:
    """Nothing is held or promised."""
    assert is_idle(role.load())
    assert not role._requests
    assert not role.engine.scheduler.has_work

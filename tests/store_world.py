"""Workers, routers and what is on its way between them, without threads, network or time: a test decides what happens.

The roles, pools, pins, announcers, the directory and the fence are the real ones. A page's bytes are what they stand
for: each token's place holds all tokens up to it. So whoever reads a wrong page is found out at once.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from decode_worker.role import DecodeRole
from engine.config import EngineConfig
from engine.engine import Done, Engine
from engine.scheduler import Chunk, Scheduler
from kvstore.announcer import Announcer, _first
from kvstore.directory import WorkerRecord
from kvstore.keys import PageKey, page_keys
from kvstore.lineage import Lineage
from kvstore.memory_directory import MemoryDirectory
from kvstore.page_format import PageFormat
from kvstore.pool import PageId, PagePool
from kvstore.transports import base
from prefill_worker.role import PrefillRole
from protos import errors
from protos.v1 import worker_pb2
from role_kit import PAGE, ROOT, request
from worker.puller import Fetching, Pulled

FORMAT = PageFormat(layers=1, kv_heads=1, page_size=PAGE, head_dim=1, dtype="float32")
LEASE_S = 3.0
NOTICE_S = 5.0  # within which a worker knows that a stream has ended
Place = tuple[int, ...]  # what a token's K and V depend on: the tokens up to it


def next_token(tokens: Sequence[int]) -> int:
    """The model: greedy, and sensitive to every token before."""
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 1009
    return 1000 + value


def clean_answer(prompt: Sequence[int], length: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class Pull:
    """A copy under way, page by page; then the generations are read."""

    source: worker_pb2.PageSource
    refs: list[worker_pb2.PageRef]
    into: list[PageId]
    deadline: float
    done: Callable[[Pulled], None]
    copied: int = 0

    wanted = True


@dataclass
class Fetch:
    """A pull that nothing pins, of the leading run of `keys` that the source has when it is asked."""

    source: worker_pb2.PageSource
    keys: list[PageKey]
    into: list[PageId]
    deadline: float
    by: Fetching
    refs: list[worker_pb2.PageRef] | None = None
    copied: int = 0
    told: int = 0  # of what was copied: checked, and the role's

    @property
    def wanted(self) -> bool:
        return self.by.wanted


@dataclass
class Stream:
    """One `Connect` call. Each direction keeps its order, and neither waits for the other."""

    router: str
    node: "Node"
    to_worker: deque[worker_pb2.RouterMessage] = field(default_factory=deque)
    to_router: deque[worker_pb2.SequenceUpdate] = field(default_factory=deque)
    cut_at: float | None = None


class Node:
    """One life of a worker. It is also its role's puller and its engine's runner."""

    behind = 0

    def __init__(self, world: "World", name: str, incarnation: int, num_pages: int) -> None:
        self.world, self.name, self.incarnation = world, name, incarnation
        self.alive, self.frozen = True, False
        self.streams: dict[str, Stream] = {}  # by router; the newest
        self.pulls: list[Pull | Fetch] = []
        self.content: list[list[Place | None]] = [[None] * PAGE for _ in range(num_pages)]
        self.generations = [0] * num_pages
        self.announcer = Announcer(world.directory, self.record, LEASE_S)
        self.pool = PagePool(num_pages, self.generations, self.announcer.evicted)
        config = EngineConfig(page_size=PAGE, num_pages=num_pages, token_budget=6, max_sequences=3, max_waiting=4)
        self.engine = Engine(Scheduler(self.pool, config, self.sealed), self)
        self.role = DecodeRole(self.engine, self) if self.is_decode else PrefillRole(self.engine, self)  # type: ignore[arg-type]

    @property
    def is_decode(self) -> bool:
        return self.name.startswith("d")

    @property
    def source(self) -> worker_pb2.PageSource:
        return worker_pb2.PageSource(worker_id=self.name, incarnation=self.incarnation)

    def record(self) -> WorkerRecord:
        pool = "decode" if self.is_decode else "prefill"
        return WorkerRecord(self.name, self.incarnation, pool, "", "m", "f", FORMAT, 100, ())

    def sealed(self, page: Lineage) -> None:
        self.announcer.sealed(page.family, page.key)

    # The loop.

    def step(self) -> None:
        self.role.expire(self.world.now)
        self.role.step()
        self.publish()

    def handle(self, stream: Stream) -> None:
        message = stream.to_worker.popleft()
        if self.streams.get(stream.router) is stream:
            self.role.handle(stream.router, message)
            self.publish()

    def publish(self) -> None:
        for router, updates in self.role.take_updates().items():
            if (stream := self.streams.get(router)) and stream.cut_at is None:
                stream.to_router += updates

    def attach(self, stream: Stream) -> None:
        self.role.drop_router(stream.router)
        self.streams[stream.router] = stream

    def detach(self, stream: Stream) -> None:
        if self.streams.get(stream.router) is stream:
            del self.streams[stream.router]
            self.role.drop_router(stream.router)

    def announce(self) -> None:
        """What the announcer's thread does in a second."""
        try:
            self.announcer._renew()
            self.announcer._tell(_first(self.announcer._announce), _first(self.announcer._withdraw))
        except errors.MetadataUnavailable:
            self.announcer._lost = True

    # The engine's runner: every token that is computed reads all that are before it.

    def launch(self, chunks: list[Chunk]) -> Done:
        for chunk in chunks:
            tokens = chunk.sequence.tokens
            for at in range(chunk.end):
                page, place = chunk.sequence.pages[at // PAGE], tuple(tokens[: at + 1])
                if at < chunk.start:
                    assert self.content[page][at % PAGE] == place, (
                        "a token was computed from a page that is not its own"
                    )
                else:
                    assert self.pool.writers(page) == 1, "a page is written that nobody writes"
                    self.content[page][at % PAGE] = place
        return Done([next_token(chunk.sequence.tokens) for chunk in chunks if chunk.is_last])

    # The role's puller.

    def pull(self, source, refs, into, timeout_s, done) -> None:
        self.pulls.append(Pull(source, list(refs), list(into), self.world.now + timeout_s, done))

    def close_idle(self, now: float) -> None:
        pass

    def fetch(self, order, keys, into, timeout_s, by) -> None:
        self.pulls.append(Fetch(order.source, list(keys), list(into), self.world.now + timeout_s, by))

    def copy_page(self, pull: Pull | Fetch) -> None:
        """One page more, or the end of a copy whose source is gone or whose time is up."""
        source = self.world.life(pull.source)
        if source is None or self.world.now >= pull.deadline:
            self.end_pull(pull, errors.WorkerLost("gone", stage="hand_over"))
        elif pull.refs is None:
            pull.refs = source.locate(pull.keys)
        elif pull.copied < len(pull.refs) and pull.wanted:
            into = pull.into[pull.copied]
            assert self.pool.writers(into) == 1, "a pull writes into a page that is not its own any more"
            self.content[into] = list(source.content[pull.refs[pull.copied].page])
            pull.copied += 1
        else:
            self.end_pull(pull, self.check(pull, source))
        if isinstance(pull, Fetch) and source and pull.copied % 2 and pull in self.pulls:
            self.tell(pull, source)

    def locate(self, keys: list[PageKey]) -> list[worker_pb2.PageRef]:
        pages = enumerate(self.pool.match(keys))
        return [worker_pb2.PageRef(index=i, page=page, generation=self.generations[page]) for i, page in pages]

    @staticmethod
    def check(pull: Pull | Fetch, source: "Node") -> errors.StalePage | None:
        refs = [(ref.page, ref.generation) for ref in (pull.refs or [])[: pull.copied]]
        try:
            base.check_generations(refs, [source.generations[page] for page, _ in refs])
        except errors.StalePage as error:
            return error
        return None

    def tell(self, fetch: Fetch, source: "Node") -> None:
        """A batch is complete."""
        if error := self.check(fetch, source):
            self.end_pull(fetch, error)
        elif count := fetch.copied - fetch.told:
            fetch.told += count
            fetch.by.arrived(count)
            self.publish()

    def end_pull(self, pull: Pull | Fetch, error: errors.DiptychError | None) -> None:
        self.pulls.remove(pull)
        if isinstance(pull, Pull):
            pull.done(Pulled(len(pull.refs), error=error))
        else:
            if error is None and pull.copied > pull.told:
                pull.by.arrived(pull.copied - pull.told)
            pull.by.ended(Pulled(pull.copied, error=error))
        self.publish()


@dataclass
class Attempt:
    """A request as its router sees it."""

    wire_id: str
    clean: list[int]
    streams: dict[str, Stream]  # prefill, decode
    got: list[int] = field(default_factory=list)
    over: bool = False


class LossyDirectory(MemoryDirectory):
    """It can be away, and comes back empty."""

    up = True

    def renew(self, record: WorkerRecord, ttl_s: float) -> bool:
        if not self.up:
            raise errors.MetadataUnavailable("away")
        return super().renew(record, ttl_s)

    def lose(self) -> None:
        self.up = False
        self._workers.clear()
        self._families.clear()
        self._expiry.clear()


class World:
    """Two prefill workers and a decode worker, two routers. Seconds are virtual."""

    def __init__(self, num_pages: int) -> None:
        self.now = 0.0
        self.num_pages = num_pages
        self.directory = LossyDirectory(clock=lambda: self.now)
        self.nodes = {name: Node(self, name, 1, num_pages) for name in ("p0", "p1", "d0")}
        self.open: dict[tuple[str, str], Stream] = {}  # by router and worker, as routers see it
        self.ended: list[Stream] = []  # cut, and the worker does not know yet
        self.attempts: dict[str, Attempt] = {}
        self.keys: dict[PageKey, tuple[Place, ...]] = {}  # what a page of this key holds
        self.wires = 0
        for router in ("r0", "r1"):
            for name in self.nodes:
                self.connect(router, name)

    def life(self, source: worker_pb2.PageSource) -> Node | None:
        node = self.nodes[source.worker_id]
        return node if node.incarnation == source.incarnation else None

    def listed(self) -> list[WorkerRecord]:
        """Who is in the directory."""
        asking = self.directory.workers()
        with pytest.raises(StopIteration) as answer:  # it waits for nothing
            asking.send(None)
        return list(answer.value.value)

    # Streams.

    def connect(self, router: str, name: str) -> None:
        stream = Stream(router, self.nodes[name])
        self.open[router, name] = stream
        stream.node.attach(stream)

    def cut(self, stream: Stream) -> None:
        """The router knows at once, the worker later. What was on its way is lost."""
        stream.cut_at = self.now
        stream.to_worker.clear()
        stream.to_router.clear()
        del self.open[stream.router, stream.node.name]
        self.ended.append(stream)
        for attempt in self.attempts.values():
            for pool, used in attempt.streams.items():
                if used is stream and not (pool == "prefill" and attempt.got):
                    self.end(attempt, but=pool)

    def notice(self, stream: Stream) -> None:
        """The worker learns that a stream has ended."""
        self.ended.remove(stream)
        if stream.node.alive:
            stream.node.detach(stream)

    # Routers.

    def ask(self, router: str, prefill: str, prompt: list[int], length: int, deadline_s: float, fetch: bool) -> None:
        """`fetch`: what the other prefill worker holds is fetched from it, as far as it holds it when it is asked."""
        streams = {"prefill": self.open.get((router, prefill)), "decode": self.open.get((router, "d0"))}
        if None in streams.values():
            return
        self.wires += 1
        attempt = Attempt(f"{router}#{self.wires}", clean_answer(prompt, length), streams)
        self.attempts[attempt.wire_id] = attempt
        self.note_keys(prompt + attempt.clean)
        options = {"max_tokens": length, "deadline_s": deadline_s}
        source = self.nodes[prefill].source
        streams["decode"].to_worker.append(request("decode", attempt.wire_id, prompt, source=source, **options))
        other = self.nodes["p1" if prefill == "p0" else "p0"]
        held = len(other.pool.match(page_keys(ROOT, prompt, PAGE)))
        if fetch and held:
            options["fetch"] = worker_pb2.Fetch(source=other.source, address=other.name, pages=held)
        streams["prefill"].to_worker.append(request("prefill", attempt.wire_id, prompt, **options))

    def note_keys(self, tokens: list[int]) -> None:
        for index, key in enumerate(page_keys(ROOT, tokens, PAGE)):
            self.keys[key] = tuple(tuple(tokens[: at + 1]) for at in range(index * PAGE, (index + 1) * PAGE))

    def hear(self, stream: Stream) -> None:
        """A router takes a worker's next word."""
        update = stream.to_router.popleft()
        attempt = self.attempts.get(update.request_id)
        if attempt is None or attempt.over:
            return
        pool = next(pool for pool, used in attempt.streams.items() if used is stream)
        if update.HasField("error"):
            self.end(attempt, but=pool)
        elif pool == "prefill":
            self._from_prefill(attempt, update)
        else:
            self._take(attempt, update)
            if update.HasField("hand_over"):
                self.say(attempt, "prefill", release=worker_pb2.Release(request_id=attempt.wire_id))
            if update.finish_reason:
                assert attempt.got == attempt.clean, "tokens were lost"
                self.end(attempt, but="decode")

    def _from_prefill(self, attempt: Attempt, update: worker_pb2.SequenceUpdate) -> None:
        if update.sealed:
            self.say(attempt, "decode", pages=worker_pb2.Pages(request_id=attempt.wire_id, pages=update.sealed))
        if update.token_ids and not attempt.got:
            self._take(attempt, update)
            token = update.token_ids[0]
            self.say(attempt, "decode", start=worker_pb2.Start(request_id=attempt.wire_id, first_token=token))
        if update.finish_reason:
            self.end(attempt, but="prefill")

    def _take(self, attempt: Attempt, update: worker_pb2.SequenceUpdate) -> None:
        attempt.got += update.token_ids
        assert attempt.got == attempt.clean[: len(attempt.got)], "a wrong token, one twice, or one lost"

    def say(self, attempt: Attempt, pool: str, **message) -> None:
        stream = attempt.streams[pool]
        if stream.cut_at is None:
            stream.to_worker.append(worker_pb2.RouterMessage(**message))

    def end(self, attempt: Attempt, but: str = "") -> None:
        """Whatever the reason: workers are told to let go, but for the one that has said so itself."""
        attempt.over = True
        for pool in attempt.streams:
            if pool != but:
                self.say(attempt, pool, cancel=worker_pb2.Cancel(request_id=attempt.wire_id))

    # Deaths.

    def kill_worker(self, name: str) -> None:
        """And another life begins in its place."""
        dead = self.nodes[name]
        dead.alive = False
        for stream in [stream for stream in self.open.values() if stream.node is dead]:
            self.cut(stream)
        self.nodes[name] = Node(self, name, dead.incarnation + 1, self.num_pages)

    def kill_router(self, router: str) -> None:
        for wire_id in [wire_id for wire_id in self.attempts if wire_id.startswith(f"{router}#")]:
            del self.attempts[wire_id]
        for stream in [stream for stream in self.open.values() if stream.router == router]:
            self.cut(stream)

    def pass_time(self, seconds: float) -> None:
        """A second at a time; who is not frozen does what it does without being asked."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            for stream in [s for s in self.ended if s.cut_at is not None and self.now - s.cut_at >= NOTICE_S]:
                if not stream.node.frozen:
                    self.notice(stream)
            for node in self.nodes.values():
                if not node.frozen:
                    node.step()
                    node.announce()

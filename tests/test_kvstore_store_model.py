"""Pools, pins, pulls, roles and directory of several workers over random interleavings, with a virtual clock.

What may happen: messages are late, come twice or in another order between streams and within one; pulls go page by page
while pages are freed and used again; clients abort, streams are cut, workers and routers die and come back, stand still
and go on, the directory is lost. After every step the promises of the design must hold.
"""

import os
import random
from collections import Counter
from unittest.mock import patch

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from store_world import LEASE_S, NOTICE_S, Node, Pull, World

from kvstore.page_state import PageState
from kvstore.pool import PageId
from kvstore.transports import base

EFFORT = int(os.environ.get("MODEL_EFFORT", "1"))  # `make soak` takes more, and has the time to simplify what it finds
PHASES = set(Phase) if EFFORT > 1 else set(Phase) - {Phase.shrink}
TRUNK = [11, 12, 13, 14, 15, 16, 17, 18]
PROMPTS = [[*TRUNK, 21], [*TRUNK, 31, 32, 33, 34], [*TRUNK[:4], 41, 42, 43], [51, 52, 53, 54, 55, 56], [61, 62]]
CLOCKS = (
    "decode_worker.role.monotonic",
    "worker.prompt_role.monotonic",
    "worker.prompt_request.monotonic",
    "worker.prefix_fetch.monotonic",
)
ROUTERS = st.sampled_from(["r0", "r1"])
WORKERS = st.sampled_from(["p0", "p1", "d0"])


class StoreMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(5, 9))
    def begin(self, num_pages: int) -> None:
        self.world = World(num_pages)
        self.patches = [patch(name, lambda: self.world.now) for name in CLOCKS]
        for one in self.patches:
            one.start()

    def streams(self, queue: str) -> list:
        return [s for s in self.world.open.values() if getattr(s, queue) and not s.node.frozen]

    def working(self) -> list[Node]:
        return [node for node in self.world.nodes.values() if not node.frozen]

    # Requests.

    @rule(
        router=ROUTERS,
        prefill=st.sampled_from(["p0", "p1"]),
        asked=st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(1, 5)), min_size=1, max_size=3),
        deadline_s=st.sampled_from([4.0, 60.0]),
        fetch=st.booleans(),
        moved=st.integers(0, 60),
    )
    def ask(self, router, prefill, asked, deadline_s, fetch, moved) -> None:
        """Some requests together, and a while of what then happens."""
        for name in (prefill, "d0"):
            self.reconnect(router, name)
        for prompt, length in asked:
            self.world.ask(router, prefill, prompt, length, deadline_s, fetch)
        self.much_happens(self.world.wires + moved, moved)

    @precondition(lambda self: self.world.attempts)
    @rule(data=st.data())
    def abort(self, data) -> None:
        self.world.end(data.draw(st.sampled_from(list(self.world.attempts.values()))))

    # What is on its way.

    @precondition(lambda self: self.streams("to_worker"))
    @rule(data=st.data())
    def a_message_comes_twice(self, data) -> None:
        queue = data.draw(st.sampled_from(self.streams("to_worker"))).to_worker
        queue.insert(data.draw(st.integers(1, len(queue))), queue[0])

    @precondition(lambda self: any(len(s.to_worker) > 1 for s in self.world.open.values()))
    @rule(data=st.data())
    def messages_change_places(self, data) -> None:
        stream = data.draw(st.sampled_from([s for s in self.world.open.values() if len(s.to_worker) > 1]))
        stream.to_worker.rotate(data.draw(st.integers(1, 2)))

    @rule(seed=st.integers(0, 10**6), events=st.integers(1, 40))
    def much_happens(self, seed, events) -> None:
        """Any worker steps, hears or copies a page, any router hears: in any order."""
        rng = random.Random(seed)
        for _ in range(events):
            kind = rng.choice(["to_worker", "to_router", "step", "pull"])
            if kind == "step" and (nodes := self.working()):
                rng.choice(nodes).step()
            elif kind == "pull" and (pulls := [(node, pull) for node in self.working() for pull in node.pulls]):
                node, pull = rng.choice(pulls)
                node.copy_page(pull)
            elif kind == "to_worker" and (streams := self.streams(kind)):
                stream = rng.choice(streams)
                stream.node.handle(stream)
            elif kind == "to_router" and (streams := self.streams(kind)):
                self.world.hear(rng.choice(streams))

    def calm(self) -> None:
        """Everything that is on its way arrives."""
        for stream in [*self.streams("to_worker")]:
            while stream.to_worker:
                stream.node.handle(stream)
        for node in self.working():
            node.step()
            for pull in list(node.pulls):
                while pull in node.pulls:
                    node.copy_page(pull)
        for stream in [*self.streams("to_router")]:
            while stream.to_router:
                self.world.hear(stream)

    # Time, and deaths.

    @rule(seconds=st.sampled_from([0.5, 2.0, 6.0]))
    def time_passes(self, seconds) -> None:
        self.world.pass_time(seconds)

    @precondition(lambda self: self.world.open)
    @rule(data=st.data())
    def cut(self, data) -> None:
        self.world.cut(data.draw(st.sampled_from(list(self.world.open.values()))))

    @precondition(lambda self: any(not s.node.frozen for s in self.world.ended))
    @rule(data=st.data())
    def a_worker_notices_a_cut(self, data) -> None:
        self.world.notice(data.draw(st.sampled_from([s for s in self.world.ended if not s.node.frozen])))

    def reconnect(self, router, name) -> None:
        if (router, name) not in self.world.open and not self.world.nodes[name].frozen:
            self.world.connect(router, name)

    @rule(name=WORKERS)
    def kill_a_worker(self, name) -> None:
        self.world.kill_worker(name)

    @rule(router=ROUTERS)
    def kill_a_router(self, router) -> None:
        self.world.kill_router(router)

    @rule(name=WORKERS, frozen=st.booleans())
    def freeze_or_thaw(self, name, frozen) -> None:
        self.world.nodes[name].frozen = frozen

    @rule(up=st.booleans())
    def the_directory_goes_or_comes(self, up) -> None:
        self.world.directory.lose()
        self.world.directory.up = up

    # What must be true after every step.

    @invariant()
    def every_page_has_the_readers_and_the_writer_that_there_are(self) -> None:
        for node in self.world.nodes.values():
            readers, writers, promised = self.owners(node)
            for page in map(PageId, range(node.pool.total_pages)):
                assert node.pool.readers(page) == readers[page]
                assert node.pool.writers(page) == writers[page] <= 1, "a page has two owners"
                if writers[page]:
                    assert node.pool.state(page) in (PageState.RESERVED, PageState.FILLING)
            held = len(+readers | +writers)
            assert node.pool.held_pages == held
            assert node.pool.available_pages == node.pool.total_pages - held - promised >= 0

    @staticmethod
    def owners(node: Node) -> tuple[Counter[int], Counter[int], int]:
        """Who should read and write each page, and how many pages are promised, by those that hold them."""
        scheduler = node.engine.scheduler
        sequences = {id(s): s for s in (*scheduler.running, *scheduler.waiting, *scheduler.arriving)}
        for one in node.role._requests.values():
            sequences[id(one.sequence)] = one.sequence
        readers, writers = Counter[int](), Counter[int]()
        for pull in node.pulls:  # those of requests that have ended still write
            if isinstance(pull, Pull):
                sequence = pull.done.args[0].sequence
                sequences[id(sequence)] = sequence
            else:
                writers.update(pull.by._orphans)
        for sequence in sequences.values():
            readers.update(sequence.pages[: sequence.sealed])
            writers.update(sequence.pages[sequence.sealed :])
        for pin in () if node.is_decode else node.role._pins._pins.values():
            readers.update(list(pin.pages))
        return readers, writers, sum(s.credit.remaining for s in sequences.values() if s.credit is not None)

    @invariant()
    def what_can_be_found_is_what_its_key_says(self) -> None:
        for node in self.world.nodes.values():
            for key, page in node.pool._index.items():
                assert tuple(node.content[page]) == self.world.keys[key], "a stale page became visible"
                assert node.pool.state(page) is PageState.SEALED

    @invariant()
    def pulls_write_only_into_pages_that_wait_for_them(self) -> None:
        for node in self.world.nodes.values():
            into = [page for pull in node.pulls for page in pull.into[getattr(pull, "told", 0) :]]
            assert len(into) == len(set(into))
            assert all(node.pool.state(page) is PageState.FILLING for page in into)

    @invariant()
    def who_is_dead_holds_nothing_after_5_seconds(self) -> None:
        now = self.world.now
        for node in self.working():
            known = {router for router, stream in node.streams.items() if self.is_fresh(stream)}
            owners = {one.router_id for one in node.role._requests.values()}
            if not node.is_decode:
                owners |= {pin.owner for pin in node.role._pins._pins.values()}
            assert owners <= known
        for record in self.world.listed():
            end, _ = self.world.directory._workers[record.holder]
            assert now < end <= now + LEASE_S

    def is_fresh(self, stream) -> bool:
        """A frozen worker may learn of a cut when it wakes; it is then looked at after its next second."""
        return stream.cut_at is None or stream in self.world.ended

    def teardown(self) -> None:
        """When all have been answered and every deadline has passed, nothing is held anywhere."""
        if not hasattr(self, "world"):
            return
        try:
            for node in self.world.nodes.values():
                node.frozen = False
            self.world.directory.up = True
            for _ in range(3):
                self.calm()
            self.world.pass_time(NOTICE_S + 60.0)
            self.calm()
            self.finish()
        finally:
            for one in self.patches:
                one.stop()

    def finish(self) -> None:
        for node in self.world.nodes.values():
            assert not node.pulls
            assert not node.role._requests
            assert (node.pool.held_pages, node.pool.available_pages) == (0, node.pool.total_pages)
            node.announce()
            found = {key for family in self.world.directory._families.values() for key in family}
            held = {key for key, page in node.pool._index.items()}
            assert held <= found, "the directory has not been told"
        self.every_page_has_the_readers_and_the_writer_that_there_are()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=80 * EFFORT, stateful_step_count=30, deadline=None, phases=PHASES)


def strand_the_pulls(world: World) -> Node:
    """A prefill worker loses the router, and with it the pins, while decode pulls; its pages are used again.

    Then decode's copies go on to their ends.
    """
    p0, d0 = world.nodes["p0"], world.nodes["d0"]
    to_prefill, to_decode = world.open["r0", "p0"], world.open["r0", "d0"]
    world.ask("r0", "p0", PROMPTS[0], 3, 60.0, fetch=False)
    p0.handle(to_prefill)
    for _ in range(4):
        p0.step()
    while to_prefill.to_router:
        world.hear(to_prefill)
    while to_decode.to_worker:
        d0.handle(to_decode)
    world.cut(to_prefill)
    world.notice(to_prefill)
    for prompt in PROMPTS[1:4]:
        world.ask("r1", "p0", prompt, 1, 60.0, fetch=False)
        p0.handle(world.open["r1", "p0"])
    for _ in range(20):
        p0.step()
    while d0.pulls:
        d0.copy_page(d0.pulls[0])
    return d0


@pytest.fixture
def world(monkeypatch) -> World:
    world = World(num_pages=5)
    for name in CLOCKS:
        monkeypatch.setattr(name, lambda: world.now)
    return world


def test_a_page_that_was_used_again_is_never_visible(world):
    decode = strand_the_pulls(world)
    [update] = world.open["r0", "d0"].to_router
    assert update.error.code == "stale_page"
    assert decode.pool.available_pages == decode.pool.total_pages
    assert not decode.pool._index


def test_the_world_finds_out_when_the_fence_is_missing(world, monkeypatch):
    monkeypatch.setattr(base, "check_generations", lambda refs, found: None)
    decode = strand_the_pulls(world)
    with pytest.raises(AssertionError, match="not its own"):
        decode.step()

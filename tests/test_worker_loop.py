"""The thread that owns a role: messages in, updates out, nothing lost when a step fails or a router changes."""

import asyncio
import threading

import pytest
import pytest_asyncio

from prefill_worker.role import PrefillRole
from protos.errors import WorkerLost
from role_kit import ScriptedPuller, assert_empty, make_engine, release, request
from worker.loop import WorkerLoop
from worker.outbox import Outbox
from worker.role import is_idle


@pytest_asyncio.fixture
async def kit():
    engine, runner = make_engine()
    role = PrefillRole(engine, ScriptedPuller())
    loop = WorkerLoop(role)
    loop.start()
    yield loop, role, runner
    async with asyncio.timeout(5):
        while not is_idle(loop.load):  # the last messages are still on their way
            await asyncio.sleep(0.01)
    await asyncio.to_thread(loop.stop)
    assert not loop.alive
    assert_empty(role)


async def attach(loop: WorkerLoop, router: str = "r") -> Outbox:
    outbox = Outbox(asyncio.get_running_loop())
    loop.attach(router, outbox)
    return outbox


async def until_token(outbox: Outbox) -> int:
    while True:
        step = await asyncio.wait_for(outbox.take(), 5)
        for update in step.updates:
            if update.token_ids:
                return update.token_ids[0]


async def test_a_message_becomes_a_token(kit):
    loop, _, _ = kit
    outbox = await attach(loop)
    loop.handle("r", request("prefill", "a", range(10)))
    assert await until_token(outbox) == 1010
    loop.handle("r", release("a"))


async def test_a_message_that_breaks_its_handler_does_not_end_the_thread(kit):
    loop, _, _ = kit
    outbox = await attach(loop)
    loop.post(lambda: 1 // 0)
    loop.handle("r", request("prefill", "a", range(10)))
    assert await until_token(outbox) == 1010
    loop.handle("r", release("a"))


async def test_a_question_is_answered_in_the_loops_thread(kit):
    loop, role, _ = kit
    asked = await asyncio.wrap_future(loop.ask(lambda it: (it, threading.current_thread().name)))
    assert asked == (role, "worker-loop")
    with pytest.raises(ZeroDivisionError):
        await asyncio.wrap_future(loop.ask(lambda it: 1 // 0))


async def test_a_question_that_nobody_waits_for_is_not_asked(kit):
    loop, _, _ = kit
    go_on, asked = threading.Event(), []
    loop.post(lambda: go_on.wait(5))
    question = loop.ask(lambda it: asked.append(it))
    assert question.cancel()
    go_on.set()
    await asyncio.wrap_future(loop.ask(lambda it: None))
    assert not asked


async def test_a_failed_expiry_does_not_end_the_thread(kit, monkeypatch):
    loop, role, _ = kit
    outbox = await attach(loop)
    with monkeypatch.context() as broken:
        broken.setattr(role, "expire", lambda now: 1 // 0)
        await asyncio.sleep(0.1)
    loop.handle("r", request("prefill", "a", range(10)))
    assert await until_token(outbox) == 1010
    loop.handle("r", release("a"))


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("broken"), "internal"), (WorkerLost("no answer from the GPU"), "worker_lost")]
)
async def test_a_failed_step_is_answered_and_the_loop_goes_on(kit, error, code):
    loop, _, runner = kit
    outbox = await attach(loop)
    runner.fail = error
    loop.handle("r", request("prefill", "a", range(10)))
    step = await asyncio.wait_for(outbox.take(), 5)
    assert (step.updates[0].error.code, step.updates[0].error.request_id) == (code, "a")
    runner.fail = None
    loop.handle("r", request("prefill", "b", range(4)))
    assert await until_token(outbox) == 1004
    loop.handle("r", release("b"))


async def test_a_new_stream_of_a_router_ends_what_the_old_one_began(kit):
    loop, _, _ = kit
    old = await attach(loop)
    loop.handle("r", request("prefill", "a", range(10)))
    await until_token(old)
    new = await attach(loop)
    loop.detach("r", old)  # the old stream notices late: the new one must not suffer
    loop.handle("r", request("prefill", "a", range(10)))
    assert await until_token(new) == 1010
    async with asyncio.timeout(5):
        while loop.load.held_pages != 3:  # those of the new stream's request alone
            await asyncio.sleep(0.01)
    loop.detach("r", new)

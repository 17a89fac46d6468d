"""Updates for one router wait for its stream, in order, and leave together."""

import asyncio

import pytest

from protos.v1 import common_pb2, worker_pb2
from worker.outbox import Outbox


def update(token: int) -> worker_pb2.SequenceUpdate:
    return worker_pb2.SequenceUpdate(request_id="a", token_ids=[token])


def tokens(step: worker_pb2.Step) -> list[int]:
    return [token for update in step.updates for token in update.token_ids]


async def test_what_waits_leaves_as_one_message_in_order():
    outbox = Outbox(asyncio.get_running_loop())
    for token in range(5):
        await asyncio.to_thread(outbox.post, [update(token)], worker_pb2.WorkerLoad(running=token))
    step = await asyncio.wait_for(outbox.take(), 1)
    assert tokens(step) == [0, 1, 2, 3, 4]
    assert step.load.running == 4
    await asyncio.to_thread(outbox.post, [update(5)], worker_pb2.WorkerLoad())
    assert tokens(await asyncio.wait_for(outbox.take(), 1)) == [5]


async def test_messages_stay_below_what_the_wire_carries():
    """A router that reads slowly, and log-probabilities: in order, in several messages, the last words too."""
    large = common_pb2.TokenLogprobs(top_ids=range(20), top_logprobs=[-1.0] * 20)
    outbox = Outbox(asyncio.get_running_loop())
    updates = [update(token) for token in range(300)]
    for one in updates:
        one.logprobs.extend([large] * 500)
    outbox.post(updates, worker_pb2.WorkerLoad(running=3))
    taken, sizes = [], []
    while len(taken) < 300:
        step = await asyncio.wait_for(outbox.take(), 1)
        taken += tokens(step)
        sizes.append(step.ByteSize())
        assert step.load.running == 3
    assert taken == list(range(300))
    assert 2 < len(sizes) < 20
    assert max(sizes) <= 4 * 1024 * 1024
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.take(), 0.05)


async def test_one_update_that_is_large_by_itself_leaves_by_itself():
    outbox = Outbox(asyncio.get_running_loop())
    large = update(7)
    large.logprobs.extend([common_pb2.TokenLogprobs(top_logprobs=[-1.0] * 20)] * 60_000)
    assert large.ByteSize() > 4 * 1024 * 1024
    outbox.post([large, update(8)], worker_pb2.WorkerLoad())
    assert [tokens(await asyncio.wait_for(outbox.take(), 1)) for _ in range(2)] == [[7], [8]]


async def test_a_closed_outbox_ends_whoever_waits():
    outbox = Outbox(asyncio.get_running_loop())
    waiting = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.close()
    assert await asyncio.wait_for(waiting, 1) is None


async def test_take_waits_for_something():
    outbox = Outbox(asyncio.get_running_loop())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.take(), 0.05)
    outbox.post([update(1)], worker_pb2.WorkerLoad())
    assert tokens(await asyncio.wait_for(outbox.take(), 1)) == [1]

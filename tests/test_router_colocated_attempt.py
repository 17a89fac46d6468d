"""A request's life on a colocated worker: one worker, no hand-over, the same promises."""

import asyncio

import pytest
import pytest_asyncio

from fake_worker import FORMAT, LENGTH, PAGE_SIZE, STOP, echo, never
from kvstore.keys import page_keys
from protos import errors
from protos.v1 import common_pb2, worker_pb2
from router.served_model import ServedModel
from router_rig import Rig, fails, messages, until
from tiny_model import EOS_ID, make_tiny_model

PROMPT = list(range(3, 43))  # 40 tokens: two full pages and a part of a third


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_positions=16384)


@pytest_asyncio.fixture
async def rig(model):
    """Two colocated workers and no others. Whatever a test does, nothing may be held at its end."""
    async with Rig(model, 0, 0, colocated_count=2) as rig:
        await until(lambda: len(rig.router.fleet.usable("colocated")) == 2)
        yield rig


def kinds(worker) -> list[str]:
    return [message.WhichOneof("kind") for message in worker.messages]


async def test_an_answer_is_whole_and_told_with_its_numbers(rig):
    rig.colocated[0].pause_s = 0.01
    whole = await rig.complete(PROMPT, max_tokens=12, seed=77)
    assert whole.token_ids == echo(PROMPT)[:12]
    assert whole.text == rig.tokenizer.decode(whole.token_ids)
    assert whole.last.finish_reason == LENGTH
    stats = whole.last.stats
    assert (stats.prefill_worker, stats.decode_worker) == ("colocated-0", "colocated-0")
    assert (stats.pages_handed_over, stats.bytes_handed_over, stats.transport, stats.hand_over_ms) == (0, 0, "", 0.0)
    assert (stats.prompt_pages, stats.prefill_prefix_pages, stats.prefill_attempts) == (2, 1, 1)
    assert 1.5 <= stats.queue_ms < stats.first_token_ms == stats.decode_joined_ms
    assert kinds(rig.colocated[0]) == ["hello", "prefill"]
    [prefill] = rig.colocated[0].said("prefill")
    assert (prefill.sampling.max_tokens, prefill.sampling.seed) == (12, 77)


async def test_a_worker_fetches_what_another_has_and_is_too_busy_to_use(rig, model):
    busy, idle = rig.colocated
    prompt = list(range(3, 203)) * 5
    keys = page_keys(ServedModel.load("tiny", model).root_key("", ("weights", FORMAT)), prompt, PAGE_SIZE)
    rig.directory.publish(busy.record.holder, keys[0], keys[:50])
    busy.load.queued_tokens = 100_000
    await busy.say("nobody")
    await asyncio.sleep(0.1)
    assert (await rig.complete(prompt, max_tokens=3)).last.stats.prefill_worker == idle.record.worker_id
    [prefill] = idle.said("prefill")
    assert (prefill.fetch.source.worker_id, prefill.fetch.pages) == (busy.record.worker_id, 50)


async def test_log_probabilities_reach_the_client_with_their_tokens(rig):
    answer = echo(PROMPT)

    def scores(tokens):
        return [common_pb2.TokenLogprobs(token_id=token) for token in tokens]

    async def script(worker, message):
        await worker.say(message.request_id, prompt_logprobs=scores(PROMPT[1:20]))
        await worker.say(message.request_id, prompt_logprobs=scores(PROMPT[20:]))
        report = worker_pb2.PrefillReport()
        await worker.say(message.request_id, token_ids=answer[:1], logprobs=scores(answer[:1]), prefill=report)
        await worker.say(message.request_id, token_ids=answer[1:6], logprobs=scores(answer[1:6]))

    rig.colocated[0].script = script
    found = [message async for message in messages(rig.generate(PROMPT, max_tokens=4, logprobs=0, prompt_logprobs=0))]
    assert [one.token_id for message in found for one in message.prompt_logprobs] == PROMPT[1:]
    assert [one.token_id for message in found for one in message.logprobs] == answer[:4]


async def test_a_first_token_can_be_the_whole_answer(rig):
    whole = await rig.complete(PROMPT, max_tokens=1)
    assert (whole.token_ids, whole.last.finish_reason) == (echo(PROMPT)[:1], LENGTH)
    for worker in rig.colocated:
        worker.answer = lambda prompt: [EOS_ID] * 9
    whole = await rig.complete(PROMPT, ignore_eos=False)
    assert (whole.token_ids, whole.last.finish_reason) == ([EOS_ID], STOP)


async def test_an_answer_that_the_router_ends_is_cancelled(rig):
    text = rig.tokenizer.decode(echo(PROMPT)[:20])
    whole = await rig.complete(PROMPT, max_tokens=500, stop=[text[-3:]])
    assert whole.last.finish_reason == STOP
    await rig.colocated[0].hears("cancel")


async def test_a_client_that_goes_away_is_cancelled(rig):
    rig.colocated[0].pause_s = 0.02
    call = rig.generate(PROMPT, max_tokens=500)
    await call.read()
    call.cancel()
    await rig.colocated[0].hears("cancel")


async def test_a_deadline_names_the_phase(rig):
    rig.colocated[0].pause_s = 0.02
    error = await fails(rig.generate(PROMPT, max_tokens=500, deadline_s=0.4), errors.DeadlineExceeded)
    assert error.stage == "decode"
    await rig.colocated[0].hears("cancel")


async def test_a_worker_that_dies_before_the_first_token_is_only_a_pause(rig):
    rig.colocated[0].script = never
    call = asyncio.create_task(rig.complete(PROMPT))
    await rig.colocated[0].hears("prefill")
    await rig.colocated[0].die()
    whole = await call
    assert whole.token_ids == echo(PROMPT)[:8]
    assert (whole.last.stats.prefill_attempts, whole.last.stats.decode_worker) == (2, "colocated-1")


async def test_a_worker_that_dies_later_ends_the_request_with_a_typed_error(rig):
    rig.colocated[0].pause_s = 0.02
    call = messages(rig.generate(PROMPT, max_tokens=500))
    found = list((await anext(call)).token_ids)
    await rig.colocated[0].die()
    with pytest.raises(errors.WorkerLost) as caught:
        async for message in call:
            found += message.token_ids
    assert caught.value.stage == "decode"
    assert found == echo(PROMPT)[: len(found)]
    assert not rig.colocated[1].said("prefill")


async def test_a_worker_that_has_no_room_is_avoided(rig):
    async def refuse(worker, message):
        await worker.refuse(message.request_id, errors.Overloaded("full", stage="queue"))

    rig.colocated[0].script = refuse
    whole = await rig.complete(PROMPT)
    assert whole.last.stats.decode_worker == "colocated-1"


async def test_two_requests_go_to_two_workers(rig):
    for worker in rig.colocated:
        worker.pause_s = 0.02
    both = await asyncio.gather(rig.complete(PROMPT), rig.complete(PROMPT))
    assert {whole.last.stats.decode_worker for whole in both} == {"colocated-0", "colocated-1"}


async def test_no_worker_is_told_by_its_pool(model):
    async with Rig(model, 0, 0, {"worker_wait_s": 0.2}, colocated_count=1) as rig:
        await rig.complete(PROMPT)
        rig.colocated[0].announce(draining=True)
        await until(lambda: not rig.router.fleet.usable("colocated"))
        error = await fails(rig.generate(PROMPT), errors.NoWorkers)
        assert "no colocated worker takes requests (1 known, 1 connected, 1 draining)" in error.message
        rig.colocated[0].lose_lease()
        await rig.colocated[0].die()
        await until(lambda: not rig.router.fleet.links)
        assert "no worker is known" in (await fails(rig.generate(PROMPT), errors.NoWorkers)).message


async def test_beside_split_pools_the_cheaper_is_taken(model):
    """An idle colocated worker saves the hand-over; a busy one loses to the pair."""
    async with Rig(model, 1, 1, colocated_count=1) as rig:
        await until(lambda: len(rig.router.fleet.usable("decode")) == len(rig.router.fleet.usable("prefill")) == 1)
        await until(lambda: rig.router.fleet.usable("colocated"))
        assert (await rig.complete(PROMPT)).last.stats.decode_worker == "colocated-0"
        rig.colocated[0].load.queued_tokens = 50_000
        await rig.colocated[0].say("nobody")
        [link] = rig.router.fleet.usable("colocated")
        await until(lambda: link.step_load.load.queued_tokens >= 50_000)
        assert (await rig.complete(PROMPT)).last.stats.decode_worker == "decode-0"
        await rig.decode.die()
        await until(lambda: not rig.router.fleet.usable("decode"))
        assert (await rig.complete(PROMPT)).last.stats.decode_worker == "colocated-0"

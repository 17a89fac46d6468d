"""A request's life: handed from prefill to decode, placed again, cancelled, late, and let down by its workers."""

import asyncio
import time

import pytest
import pytest_asyncio

from engine.tokenizer import Tokenizer
from fake_worker import FORMAT, LENGTH, PAGE_SIZE, STOP, echo, never, page_refs, serve_decode, serve_prefill
from kvstore.keys import pack_keys, page_keys, unpack_tokens
from protos import errors
from protos.v1 import common_pb2, worker_pb2
from router.served_model import ServedModel
from router_rig import Rig, fails, messages, read, until
from tiny_model import EOS_ID, make_tiny_model

PROMPT = list(range(3, 43))  # 40 tokens: two full pages and a part of a third


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_positions=16384)


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer.from_dir(model)


@pytest_asyncio.fixture
async def rig(model):
    """One worker in each pool. Whatever a test does, nothing may be held at its end."""
    async with Rig(model) as rig:
        yield rig


@pytest_asyncio.fixture
async def big_rig(model):
    """Four prefill workers and two decode workers."""
    async with Rig(model, 4, 2) as rig:
        yield rig


def scores(tokens):
    return [common_pb2.TokenLogprobs(token_id=token) for token in tokens]


def spell(tokenizer: Tokenizer, text: str):
    """An answer that writes this text, one byte a token, and then goes on."""
    ids = [token for byte in text.encode() for token in tokenizer.encode(bytes([byte]).decode("latin-1"))[-1:]]
    return lambda prompt: ids + [5] * 4096


# The life as it should be


async def test_prefill_is_told_where_pages_can_be_fetched_and_the_client_what_came_of_it(rig, model):
    async def script(worker, message):
        report = worker_pb2.PrefillReport(queue_ms=6.0, prefix_pages=1, fetched_pages=4, fetch_ms=5.0)
        await worker.say(message.request_id, sealed=page_refs(message), token_ids=[9], prefill=report)

    prompt = list(range(3, 203)) * 5
    keys = page_keys(ServedModel.load("tiny", model).root_key("", ("weights", FORMAT)), prompt, PAGE_SIZE)
    rig.directory.publish(rig.decode.record.holder, keys[0], keys[:50])
    rig.prefill.script = script
    stats = (await rig.complete(prompt, max_tokens=3)).last.stats
    [fetch] = [message.fetch for message in rig.prefill.said("prefill")]
    assert (fetch.pages, fetch.address, fetch.source.worker_id) == (50, rig.decode.record.address, "decode-0")
    assert (stats.prefill_prefix_pages, stats.prefill_fetched_pages, stats.fetch_ms) == (1, 4, 5.0)
    await rig.complete(PROMPT)
    assert not rig.prefill.said("prefill")[1].HasField("fetch")


async def test_an_answer_is_whole_and_told_with_its_numbers(rig):
    rig.prefill.pause_s = 0.05  # longer than the queue that it tells of
    whole = await rig.complete(PROMPT, max_tokens=12)
    assert whole.token_ids == echo(PROMPT)[:12]
    assert whole.text == rig.tokenizer.decode(whole.token_ids)
    assert whole.last.finish_reason == LENGTH
    assert (whole.last.usage.prompt_tokens, whole.last.usage.completion_tokens) == (40, 12)
    stats = whole.last.stats
    assert (stats.prefill_worker, stats.decode_worker) == ("prefill-0", "decode-0")
    assert (stats.prompt_pages, stats.prefill_prefix_pages, stats.decode_prefix_pages) == (2, 1, 1)
    assert (stats.pages_handed_over, stats.bytes_handed_over, stats.transport) == (2, 4096, "shm")
    assert (stats.prefill_attempts, stats.prefill_ms, stats.hand_over_ms) == (1, 20.0, 3.0)
    assert 1.5 <= stats.queue_ms < stats.first_token_ms < stats.decode_joined_ms


async def test_both_workers_are_told_all_of_it_at_once(rig, model):
    await rig.complete(PROMPT, max_tokens=5, seed=77, stop_token_ids=[9, 300 - 50], ignore_eos=False)
    (prefill,), (decode,) = rig.prefill.said("prefill"), rig.decode.said("decode")
    root = ServedModel.load("tiny", model).root_key("", ("weights", FORMAT))
    for message in (prefill, decode):
        assert unpack_tokens(message.token_ids) == PROMPT
        assert message.page_keys == pack_keys(page_keys(root, PROMPT, PAGE_SIZE))
        assert (message.sampling.seed, message.sampling.max_tokens) == (77, 5)
        assert list(message.end_token_ids) == [EOS_ID, 9, 250]
        assert 0 < message.deadline_s < 20 * 1.05  # gRPC rounds a deadline up on its way
    assert decode.source.worker_id == "prefill-0"
    assert decode.source.incarnation == rig.prefill.record.incarnation
    assert [endpoint.transport for endpoint in decode.source.endpoints] == ["shm"]


async def test_log_probabilities_reach_the_client_with_their_tokens(rig):
    """Also those of a prompt whose first attempt failed half way: each once."""
    answer = echo(PROMPT)

    async def prefill(worker, message):
        first = scores(PROMPT[1:20])
        await worker.say(message.request_id, sealed=page_refs(message)[:1], prompt_logprobs=first)
        if len(worker.said("prefill")) == 1:
            await worker.refuse(message.request_id, errors.StalePage("once"))
            return
        await worker.say(message.request_id, prompt_logprobs=scores(PROMPT[20:]))
        pages, report = page_refs(message)[1:], worker_pb2.PrefillReport()
        await worker.say(
            message.request_id, sealed=pages, token_ids=answer[:1], logprobs=scores(answer[:1]), prefill=report
        )

    async def decode(worker, message):
        await worker.say(message.request_id, hand_over=worker_pb2.HandOverReport())
        for token in answer[1:6]:
            await worker.say(message.request_id, token_ids=[token], logprobs=scores([token]))

    rig.prefill.script, rig.decode.script = prefill, decode
    found = [message async for message in messages(rig.generate(PROMPT, max_tokens=4, logprobs=0, prompt_logprobs=0))]
    assert [one.token_id for message in found for one in message.prompt_logprobs] == PROMPT[1:]
    for message in found:
        assert [one.token_id for one in message.logprobs] == list(message.token_ids)
    assert [token for message in found for token in message.token_ids] == answer[:4]
    assert found[-1].stats.prefill_attempts == 2


async def test_pages_are_named_to_decode_in_order_before_start(rig):
    await rig.complete(PROMPT)
    kinds = [message.WhichOneof("kind") for message in rig.decode.messages]
    assert kinds == ["hello", "decode", "pages", "pages", "start"]
    named = [ref for pages in rig.decode.said("pages") for ref in pages.pages]
    assert named == page_refs(rig.prefill.said("prefill")[0])
    assert rig.decode.said("start")[0].first_token == echo(PROMPT)[0]
    await rig.prefill.hears("release")
    assert not rig.prefill.said("cancel") + rig.decode.said("cancel")


async def test_prefill_is_released_as_soon_as_decode_has_joined(rig):
    rig.decode.pause_s = 0.02
    call = rig.generate(PROMPT, max_tokens=2000)
    reading = asyncio.create_task(read(call))
    await rig.prefill.hears("release")
    assert not rig.prefill.held
    assert rig.decode.held
    call.cancel()
    await asyncio.wait({reading})


async def test_pages_are_handed_over_while_prefill_still_runs(rig):
    rig.prefill.pause_s = 3600  # between the pages and the first token
    call = rig.generate(PROMPT)
    reading = asyncio.create_task(read(call))
    assert len((await rig.decode.hears("pages")).pages) == 2
    call.cancel()
    await asyncio.wait({reading})


async def test_the_first_token_waits_for_nothing_that_decode_does(rig):
    rig.decode.script = never
    call = rig.generate(PROMPT)
    first = await anext(messages(call))
    assert list(first.token_ids) == echo(PROMPT)[:1]
    call.cancel()


async def test_a_seed_is_drawn_where_none_is_given(rig):
    await rig.complete()
    await rig.complete()
    first, second = rig.prefill.said("prefill")
    assert first.sampling.seed != second.sampling.seed
    assert rig.decode.said("decode")[0].sampling.seed == first.sampling.seed


# Where an answer ends


async def test_the_end_of_sequence_ends_the_answer(rig):
    rig.prefill.answer = rig.decode.answer = lambda prompt: [20, 21, EOS_ID, 23]
    whole = await rig.complete(ignore_eos=False)
    assert whole.token_ids == [20, 21, EOS_ID]
    assert whole.last.finish_reason == STOP
    assert whole.text == rig.tokenizer.decode([20, 21])


@pytest.mark.parametrize(
    ("sampling", "reason", "ids"),
    [
        ({"max_tokens": 1}, LENGTH, [20]),
        ({"stop_token_ids": [20]}, STOP, [20]),
        ({"stop": ["2"]}, STOP, [20]),  # token 20 is "2"
    ],
    ids=["max_tokens", "stop id", "stop string"],
)
async def test_a_first_token_that_ends_the_answer_ends_both_workers(rig, sampling, reason, ids):
    rig.prefill.answer = lambda prompt: [20, 21]
    whole = await rig.complete(**sampling)
    assert (whole.token_ids, whole.last.finish_reason) == (ids, reason)
    assert whole.last.usage.completion_tokens == 1
    assert whole.last.stats.decode_worker == ""  # it never worked on this
    await rig.prefill.hears("release")
    await rig.decode.hears("cancel")
    assert not rig.decode.said("start")


async def test_a_stop_string_ends_the_answer_wherever_token_borders_fall(rig, tokenizer):
    rig.prefill.answer = rig.decode.answer = spell(tokenizer, "say it: STOP, no more")
    whole = await rig.complete(max_tokens=400, stop=["nope", "STOP"])
    assert whole.text == "say it: "
    assert whole.last.finish_reason == STOP
    assert len(whole.token_ids) == len("say it: STOP")
    assert whole.last.usage.completion_tokens == len("say it: STOP")
    await rig.decode.hears("cancel")


async def test_text_that_only_began_a_stop_string_is_not_lost(rig, tokenizer):
    rig.prefill.answer = rig.decode.answer = spell(tokenizer, "STO STOX ST")
    whole = await rig.complete(max_tokens=11, stop=["STOP"])
    assert whole.text == "STO STOX ST"
    assert whole.last.finish_reason == LENGTH


# Placed again


async def test_a_prefill_worker_that_dies_before_its_first_token_is_only_a_pause(big_rig):
    asked = first_one_stuck(big_rig)
    call = asyncio.create_task(big_rig.complete(PROMPT))
    await until(lambda: asked)
    held_by = next(worker for worker in big_rig.decodes if worker.held)
    await asked[0].die()
    whole = await call
    assert whole.token_ids == echo(PROMPT)[:8]
    assert whole.last.stats.prefill_attempts == 2
    first, second = [m.request_id for w in big_rig.decodes for m in w.said("decode")]
    assert first.split("#")[0] == second.split("#")[0]
    assert first != second
    assert [m.request_id for m in held_by.said("cancel")] == [held_by.said("decode")[0].request_id]


def first_one_stuck(rig: Rig) -> list:
    """The first prefill worker that is asked says nothing; it is put into the list that is returned."""
    asked: list = []

    async def stick_once(worker, message):
        if asked:
            await serve_prefill(worker, message)
        else:
            asked.append(worker)

    for worker in rig.prefills:
        worker.script = stick_once
    return asked


async def test_a_request_waits_for_the_worker_that_replaces_a_dead_one(rig):
    rig.prefill.script = never
    call = asyncio.create_task(rig.complete(PROMPT))
    await rig.prefill.hears("prefill")
    rig.prefill.lose_lease()
    await rig.prefill.die()
    await asyncio.sleep(0.3)
    rig.prefills.append(await rig.worker("prefill"))
    whole = await call
    assert whole.token_ids == echo(PROMPT)[:8]
    assert whole.last.stats.prefill_attempts == 2


async def test_a_worker_that_has_no_room_is_avoided(big_rig):
    async def refuse(worker, message):
        await worker.refuse(message.request_id, errors.Overloaded("full", stage="queue"))

    for worker in big_rig.prefills[:3]:
        worker.script = refuse
    for worker in big_rig.prefills[2:]:
        worker.load.tokens_per_s = 1.0  # asked last
        worker.announce(load={"tokens_per_s": 1.0})
    big_rig.prefills[2].script = serve_prefill
    whole = await big_rig.complete(PROMPT)
    assert whole.token_ids == echo(PROMPT)[:8]


async def test_three_attempts_are_enough(big_rig):
    async def refuse(worker, message):
        await worker.refuse(message.request_id, errors.Overloaded("full", stage="queue"))

    for worker in big_rig.prefills:
        worker.script = refuse
    error = await fails(big_rig.generate(PROMPT, request_id="mine"), errors.Overloaded)
    assert (error.stage, error.request_id) == ("queue", "mine")
    assert sum(len(worker.said("prefill")) for worker in big_rig.prefills) == 3


async def test_no_room_anywhere_is_told_at_once(rig):
    async def refuse(worker, message):
        await worker.refuse(message.request_id, errors.Overloaded("full", retry_after_s=4.0, stage="queue"))

    rig.prefill.script = refuse
    error = await fails(rig.generate(PROMPT), errors.Overloaded)
    assert error.retry_after_s == 4.0
    assert len(rig.prefill.said("prefill")) == 1


async def test_late_words_of_an_earlier_attempt_are_not_taken_for_the_next(rig):
    old: list[str] = []

    async def fail_then_babble(worker, message):
        old.append(message.request_id)
        if len(old) == 1:
            await worker.refuse(message.request_id, errors.StalePage("raced"))
            return
        await worker.say(old[0], token_ids=[99], sealed=page_refs(message))
        await serve_prefill(worker, message)
        await worker.say(old[0], token_ids=[98])

    rig.prefill.script = fail_then_babble
    whole = await rig.complete(PROMPT)
    assert whole.token_ids == echo(PROMPT)[:8]
    assert whole.last.stats.prefill_attempts == 2


async def test_a_decode_worker_that_dies_before_the_first_token_is_only_a_pause(big_rig):
    asked = first_one_stuck(big_rig)
    call = asyncio.create_task(big_rig.complete(PROMPT))
    await until(lambda: asked)
    await next(worker for worker in big_rig.decodes if worker.held).die()
    whole = await call
    assert whole.token_ids == echo(PROMPT)[:8]
    assert len(asked[0].said("cancel")) == 1


async def test_decode_that_cannot_reach_prefill_puts_the_blame_there(big_rig):
    refused: list[str] = []

    async def unreachable(worker, message):
        await worker.say(message.request_id, sealed=page_refs(message))
        async with asyncio.timeout(5):
            while not (holders := [d for d in big_rig.decodes if message.request_id in d.held]):
                await asyncio.sleep(0.01)
        refused.append(worker.record.worker_id)
        error = errors.WorkerLost(f"no way to {worker.record.worker_id}", stage="hand_over")
        await holders[0].refuse(message.request_id, error)

    best = big_rig.prefills[1]
    best.load.tokens_per_s = 1e6
    best.script = unreachable
    best.announce(load={"tokens_per_s": 1e6})
    await asyncio.sleep(0.7)  # the router has read it
    whole = await big_rig.complete(PROMPT)
    assert whole.token_ids == echo(PROMPT)[:8]
    assert refused == [best.record.worker_id]


async def test_what_an_operator_must_mend_is_not_tried_again(rig):
    async def mismatch(worker, message):
        await worker.refuse(message.request_id, errors.FormatMismatch("page_size 16 against 64", stage="hand_over"))

    rig.prefill.script = mismatch
    error = await fails(rig.generate(PROMPT), errors.FormatMismatch)
    assert error.stage == "hand_over"
    assert len(rig.prefill.said("prefill")) == 1


# Workers that let a request down after its first token


async def test_decode_killed_mid_stream_is_a_typed_error_within_two_seconds(rig):
    rig.decode.pause_s = 0.02
    call = messages(rig.generate(PROMPT, max_tokens=2000))
    ids = [token for _ in range(4) for token in (await anext(call)).token_ids]
    await rig.decode.die()
    killed = time.monotonic()
    with pytest.raises(errors.WorkerLost) as caught:
        async for message in call:
            ids += message.token_ids
    assert time.monotonic() - killed < 2.0
    assert caught.value.stage == "decode"
    assert ids == echo(PROMPT)[: len(ids)]


async def test_decode_killed_during_hand_over_frees_prefill(rig):
    rig.decode.script = never
    call = rig.generate(PROMPT)
    failing = asyncio.create_task(fails(call, errors.WorkerLost))
    await rig.decode.hears("start")
    await rig.decode.die()
    assert (await failing).stage == "decode"
    await rig.prefill.hears("release")


async def test_a_stale_page_after_the_first_token_is_told(rig):
    async def stale(worker, message):
        await worker.refuse(message.request_id, errors.StalePage("generation 4 against 5", stage="hand_over"))

    rig.decode.script = stale
    error = await fails(rig.generate(PROMPT, request_id="mine"), errors.StalePage)
    assert (error.stage, error.request_id) == ("hand_over", "mine")
    await rig.prefill.hears("release")


async def test_prefill_may_die_once_decode_has_what_it_needs(rig):
    pulled = asyncio.Event()

    async def pull_slowly(worker, message):
        await pulled.wait()
        await serve_decode(worker, message)

    rig.decode.script = pull_slowly
    call = asyncio.create_task(rig.complete(PROMPT))
    await rig.decode.hears("start")
    await rig.prefill.die()
    await until(lambda: not rig.router.fleet.usable("prefill"))
    pulled.set()
    assert (await call).token_ids == echo(PROMPT)[:8]


async def test_a_frozen_decode_worker_is_given_up_after_its_lease(rig):
    rig.decode.script = never
    failing = asyncio.create_task(fails(rig.generate(PROMPT), errors.WorkerLost))
    await rig.decode.hears("start")
    rig.decode.frozen = True
    rig.decode.lose_lease()
    error = await failing
    assert error.stage == "decode"
    assert "lease" in error.message
    rig.decode.held.clear()  # the frozen one cannot hear


# Cancelled, or late, wherever it is


async def in_admission(rig: Rig, monkeypatch) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: time.sleep(1.0) or [5])


async def in_placement(rig: Rig, monkeypatch) -> None:
    rig.decode.lose_lease()
    await rig.decode.die()
    await asyncio.sleep(0.7)


async def in_prefill(rig: Rig, monkeypatch) -> None:
    rig.prefill.script = never


async def in_hand_over(rig: Rig, monkeypatch) -> None:
    rig.decode.script = never


async def in_decode(rig: Rig, monkeypatch) -> None:
    rig.decode.pause_s = 0.02


STAGES = {
    "admission": in_admission,
    "placement": in_placement,
    "prefill": in_prefill,
    "hand_over": in_hand_over,
    "decode": in_decode,
}
FREED = {  # what workers hear at the end, by stage: (prefill, decode)
    "admission": (None, None),
    "placement": (None, None),
    "prefill": ("cancel", "cancel"),
    "hand_over": ("release", "cancel"),
    "decode": ("release", "cancel"),
}


async def assert_freed(rig: Rig, stage: str) -> None:
    await rig.assert_nothing_held(within_s=3.0)
    for worker, word in zip((rig.prefill, rig.decode), FREED[stage], strict=True):
        if word:
            await worker.hears(word)


@pytest.mark.parametrize("stage", STAGES)
async def test_cancel_frees_everything_at_once(rig, monkeypatch, stage):
    await STAGES[stage](rig, monkeypatch)
    call = rig.generate("word " * 1000, max_tokens=500)
    reading = asyncio.create_task(read(call))
    await until(lambda: rig.router.inference.lives)
    await asyncio.sleep(0.3)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await assert_freed(rig, stage)


@pytest.mark.parametrize("stage", STAGES)
async def test_a_deadline_names_the_stage_and_frees_everything(model, monkeypatch, stage):
    async with Rig(model, settings={"default_deadline_s": 0.6, "worker_wait_s": 60.0}) as rig:
        if stage == "placement":  # half of the time is spent on waiting, the rest here
            monkeypatch.setattr("router.placer.Placer._wait_for_workers", lambda *_: asyncio.sleep(60))
        else:
            await STAGES[stage](rig, monkeypatch)
        error = await fails(rig.generate("word " * 1000, max_tokens=500, deadline_s=None), errors.DeadlineExceeded)
        assert error.stage == stage
        await assert_freed(rig, stage)


async def test_a_client_that_vanishes_frees_everything(rig):
    rig.decode.pause_s = 0.02
    await anext(messages(rig.generate(PROMPT, max_tokens=2000)))
    await rig.channel.close(grace=None)
    await rig.assert_nothing_held(within_s=2.0)


async def test_one_request_that_ends_disturbs_no_other(rig):
    rig.decode.pause_s = 0.005
    calls = [asyncio.create_task(rig.complete([7, 8, index], max_tokens=60)) for index in range(3, 9)]
    victims = [rig.generate([9, 9, index], max_tokens=2000) for index in range(3, 9)]
    for victim in victims:
        await anext(messages(victim))
        victim.cancel()
    for index, call in enumerate(calls, 3):
        assert (await call).token_ids == echo([7, 8, index])[:60]


# Nobody to ask


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_an_empty_pool_is_named(model, pool):
    async with Rig(model, pool != "prefill", pool != "decode", {"worker_wait_s": 0.2}) as rig:
        error = await fails(rig.generate(PROMPT), errors.NoWorkers)
        assert pool in error.message
        assert error.stage == "placement"


async def test_draining_workers_take_nothing_new_and_finish_what_they_have(model):
    async with Rig(model, settings={"worker_wait_s": 0.2}) as rig:
        rig.decode.pause_s = 0.01
        running = asyncio.create_task(rig.complete(PROMPT, max_tokens=150))
        await rig.decode.hears("start")
        rig.decode.announce(draining=True)
        await asyncio.sleep(0.8)
        error = await fails(rig.generate(PROMPT), errors.NoWorkers)
        assert "1 draining" in error.message
        assert (await running).token_ids == echo(PROMPT)[:150]

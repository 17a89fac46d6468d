"""Colocated workers on real processes: answers as of split pools and of one engine by itself, and the same promises."""

import asyncio
import random
import time
from collections.abc import Callable

import grpc.aio
import pytest
import pytest_asyncio

from engine.config import EngineConfig
from engine.loader import load_model
from engine.sampling_params import SamplingParams
from engine_alone import make_engine, run
from protos import errors
from protos.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from stack import Service, Stack
from tiny_model import EOS_ID, make_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = random.Random(3).choices(range(3, 250), k=70)
LONG = [3 + index % 200 for index in range(1900)]  # hundreds of chunks under the budget below
ENGINE = EngineConfig(page_size=16, num_pages=400, token_budget=8, max_sequences=8, dtype="float32")
KINDS = [
    {},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 0.8, "top_p": 0.7, "frequency_penalty": 1.0, "logit_bias": {EOS_ID: 3.0}},
    {"prompt_logprobs": 1, "logprobs": 0},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(model):
    """Two colocated workers."""
    async with Stack(model, 0, 0, ENGINE, colocated_workers=2) as stack:
        yield stack


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def undisturbed(stack):
    """After each test nothing is held by the workers that are left."""
    yield
    await stack.assert_nothing_held(within_s=2.0)


async def test_answers_are_those_of_split_pools_and_of_one_engine(stack, model):
    """Greedy and drawn, with log-probabilities and without, all at once."""
    rng = random.Random(8)
    jobs = []
    for index in range(24):
        prompt = PROMPT[: rng.choice([0, 32, 64])] + [rng.randrange(3, 250) for _ in range(rng.randrange(1, 90))]
        jobs.append((prompt, KINDS[index % len(KINDS)] | {"seed": index, "max_tokens": rng.randrange(1, 40)}))
    together = await asyncio.gather(*(stack.client.complete(token_ids=prompt, **options) for prompt, options in jobs))
    async with Stack(model, 1, 1, ENGINE) as split:
        apart = await asyncio.gather(*(split.client.complete(token_ids=prompt, **options) for prompt, options in jobs))
    decoder = load_model(model, "float32", "cpu").model
    params = [SamplingParams.from_proto(common_pb2.SamplingParams(**options), default_seed=0) for _, options in jobs]
    alone = run(make_engine(decoder), zip([prompt for prompt, _ in jobs], params, strict=True), [EOS_ID])
    for ours, theirs, sequence in zip(together, apart, alone, strict=True):
        assert list(ours.token_ids) == sequence.tokens[sequence.prompt_len :]
        assert (ours.token_ids, ours.text, ours.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
        for found, wanted in (
            (ours.logprobs, sequence.logprobs),
            (ours.prompt_logprobs, sequence.prompt_logprobs),
        ):
            assert [one.token_id for one in found] == [one.token_id for one in wanted]
            assert [one.logprob for one in found] == pytest.approx([one.logprob for one in wanted], abs=1e-4)
        assert theirs.stats.pages_handed_over > 0 or len(theirs.token_ids) == 1


async def test_the_last_message_tells_of_one_worker_and_no_hand_over(stack):
    prompt = [7, *PROMPT]
    first = (await stack.client.complete(token_ids=prompt, max_tokens=40, ignore_eos=True)).stats
    assert first.prefill_worker == first.decode_worker
    assert (first.pages_handed_over, first.bytes_handed_over, first.transport, first.hand_over_ms) == (0, 0, "", 0.0)
    assert first.decode_joined_ms == first.first_token_ms > 0
    again = (await stack.client.complete(token_ids=prompt, max_tokens=4, ignore_eos=True)).stats
    assert again.decode_worker == first.decode_worker, "placement should prefer the worker that holds the prefix"
    assert again.prefill_prefix_pages == 4


async def test_a_stop_string_ends_the_answer_in_the_worker_too(stack):
    whole = await stack.client.complete(token_ids=PROMPT, max_tokens=60, ignore_eos=True)
    stop = whole.text[20:24]
    cut = await stack.client.complete(token_ids=PROMPT, max_tokens=1500, ignore_eos=True, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    await stack.assert_nothing_held(within_s=2.0)


@pytest.mark.parametrize(("prompt", "max_tokens", "stage"), [(LONG, 4, "prefill"), (PROMPT, 1900, "decode")])
async def test_a_deadline_ends_everything_and_names_the_phase(stack, prompt, max_tokens, stage):
    prompt = [9, *prompt]
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await stack.client.complete(token_ids=prompt, max_tokens=max_tokens, ignore_eos=True, deadline_s=0.15)
    assert caught.value.stage == stage


async def test_cancel_during_prefill(stack):
    task = asyncio.create_task(stack.client.complete(token_ids=[10, *LONG], max_tokens=4))
    await worker_with(stack, lambda load: load.queued_tokens > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancel_during_decode(stack):
    stream = stack.client.generate(token_ids=PROMPT, max_tokens=1500, ignore_eos=True)
    await anext(stream)
    await stream.aclose()


async def test_a_worker_killed_before_the_first_token_is_only_a_pause(stack):
    task = asyncio.create_task(stack.client.complete(token_ids=[11, *LONG], max_tokens=4, ignore_eos=True))
    victim = await worker_with(stack, lambda load: load.queued_tokens > 0)
    await victim.kill()
    stack.colocated.remove(victim)
    answer = await task
    assert answer.stats.prefill_attempts == 2
    assert answer.stats.decode_worker == stack.colocated[0].name
    again = await stack.client.complete(token_ids=[11, *LONG], max_tokens=4, ignore_eos=True)
    assert again.token_ids == answer.token_ids


async def test_a_worker_killed_mid_stream_is_a_typed_error_within_two_seconds(stack):
    expected = await stack.client.complete(token_ids=PROMPT, max_tokens=400, ignore_eos=True)  # by the only one left
    stream = stack.client.generate(token_ids=PROMPT, max_tokens=1500, ignore_eos=True)
    seen = (await anext(stream)).token_ids
    victim = await worker_with(stack, lambda load: load.running > 0)
    await victim.kill()
    killed = time.monotonic()
    with pytest.raises(errors.WorkerLost) as caught:
        async for chunk in stream:
            seen += chunk.token_ids
    assert time.monotonic() - killed < 2.0
    assert caught.value.stage == "decode"
    assert seen[:400] == expected.token_ids[: len(seen)]
    stack.colocated.remove(victim)


async def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_new(stack):
    await asyncio.gather(stack.add("colocated"), stack.add("colocated"))
    stream = stack.client.generate(token_ids=PROMPT, max_tokens=1500, ignore_eos=True, deadline_s=60)
    seen = (await anext(stream)).token_ids
    leaving = await worker_with(stack, lambda load: load.running > 0)
    async with grpc.aio.insecure_channel(leaving.address) as channel:
        await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(), timeout=10)
    await asyncio.sleep(1.5)  # the announcer tells, and the router reads, twice a second
    other = await stack.client.complete(token_ids=PROMPT, max_tokens=4, ignore_eos=True)
    assert other.stats.decode_worker not in ("", leaving.name)
    seen += tuple([token async for chunk in stream for token in chunk.token_ids])
    assert (len(seen), seen[:4]) == (1500, other.token_ids)
    await leaving.stop()
    stack.colocated.remove(leaving)


async def worker_with(stack: Stack, condition: Callable[[worker_pb2.WorkerLoad], bool]) -> Service:
    """Wait for a worker whose load fulfils the condition."""
    give_up = time.monotonic() + 5.0
    while True:
        found = [d.worker_id for d in await stack.descriptions() if condition(d.load)]
        if found:
            return next(worker for worker in stack.workers if worker.name == found[0])
        assert time.monotonic() < give_up
        await asyncio.sleep(0.01)

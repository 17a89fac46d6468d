"""Bad input and faults on real processes: typed errors that name field or stage, nothing leaked or disturbed."""

import asyncio
import os
import signal
import time
from contextlib import aclosing, suppress

import grpc.aio
import pytest
import pytest_asyncio

from diptych.client import Client
from engine.config import EngineConfig
from kvstore.keys import PageKey, page_keys
from kvstore.page_format import PageFormat
from kvstore.redis_directory import RedisDirectoryReader
from protos import errors
from protos.v1 import inference_pb2, inference_pb2_grpc
from router.served_model import ServedModel
from stack import Stack
from tiny_model import make_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = list(range(3, 103))
LONG = [3 + index % 200 for index in range(1900)]  # hundreds of chunks under the budget below


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    engine = EngineConfig(page_size=16, num_pages=400, token_budget=4, max_sequences=4, dtype="float32")
    async with Stack(model, 1, 1, engine) as stack:
        yield stack


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def undisturbed(stack):
    """Beside every test another request runs from start to end; after it nothing is held."""
    before = await stack.client.complete(token_ids=PROMPT, max_tokens=8, ignore_eos=True)
    yield
    after = await stack.client.complete(token_ids=PROMPT, max_tokens=8, ignore_eos=True)
    assert after.token_ids == before.token_ids
    await stack.assert_nothing_held()


BAD = {
    "no prompt": ({}, "prompt"),
    "empty text": ({"text": ""}, "text"),
    "no messages": ({"messages": []}, "chat"),
    "a role that is not one": ({"messages": [{"role": "wizard", "content": "hi"}]}, "role"),
    "no tokens": ({"token_ids": []}, "tokens"),
    "a token out of range": ({"token_ids": [3, 10**6]}, "tokens"),
    "an over-long prompt": ({"token_ids": [5] * 2100}, "prompt"),
    "10 MB of text": ({"text": "a" * 10_000_000}, "text"),
    "negative temperature": ({"text": "hi", "temperature": -1.0}, "temperature"),
    "temperature NaN": ({"text": "hi", "temperature": float("nan")}, "temperature"),
    "top_p of 0": ({"text": "hi", "top_p": 0.0}, "top_p"),
    "top_p NaN": ({"text": "hi", "top_p": float("nan")}, "top_p"),
    "negative top_k": ({"text": "hi", "top_k": -1}, "top_k"),
    "max_tokens of 0": ({"text": "hi", "max_tokens": 0}, "max_tokens"),
    "an empty stop string": ({"text": "hi", "stop": [""]}, "stop"),
    "min_p above 1": ({"text": "hi", "min_p": 1.5}, "min_p"),
    "repetition penalty of 0": ({"text": "hi", "repetition_penalty": 0.0}, "repetition_penalty"),
    "frequency penalty of 3": ({"text": "hi", "frequency_penalty": 3.0}, "frequency_penalty"),
    "presence penalty NaN": ({"text": "hi", "presence_penalty": float("nan")}, "presence_penalty"),
    "a bias for no token": ({"text": "hi", "logit_bias": {10**6: 1.0}}, "logit_bias"),
    "an empty bad word": ({"text": "hi", "bad_words": ["x", ""]}, "bad_words"),
    "a bad token out of range": ({"text": "hi", "bad_tokens": [[3, 10**6]]}, "bad_tokens"),
    "min_tokens above max_tokens": ({"text": "hi", "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    "21 log-probabilities": ({"text": "hi", "logprobs": 21}, "logprobs"),
    "-1 log-probabilities of the prompt": ({"text": "hi", "prompt_logprobs": -1}, "prompt_logprobs"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
async def test_bad_input_names_its_field(stack, case):
    options, field = BAD[case]
    with pytest.raises(errors.InvalidRequest) as caught:
        await stack.client.complete(**options)
    assert field in caught.value.field


async def test_an_unknown_model_is_refused_by_name(stack):
    with pytest.raises(errors.UnknownModel, match="gpt-9"):
        await stack.client.complete(text="hi", model="gpt-9")


async def test_bytes_that_are_no_utf8_are_refused_as_a_bad_message(stack):
    async with grpc.aio.insecure_channel(stack.router.address) as channel:
        call = channel.unary_stream(
            "/diptych.v1.Inference/Generate",
            request_serializer=bytes,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call(b"\x12\x02\xff\xfe", timeout=10):  # field 2 (text), two bytes that are no UTF-8
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_deadline_that_has_passed_is_refused(stack):
    with pytest.raises(errors.DeadlineExceeded):
        await stack.client.complete(text="hi", deadline_s=0.000001)


async def test_a_deadline_during_prefill_ends_everything(stack):
    with pytest.raises(errors.DeadlineExceeded):
        await stack.client.complete(token_ids=LONG, max_tokens=4, deadline_s=0.15)


async def test_a_deadline_during_decode_ends_everything(stack):
    with pytest.raises(errors.DeadlineExceeded):
        await stack.client.complete(token_ids=PROMPT, max_tokens=1900, ignore_eos=True, deadline_s=0.6)


async def test_cancel_before_prefill(stack):
    task = asyncio.create_task(stack.client.complete(token_ids=LONG, max_tokens=4))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancel_during_prefill(stack):
    task = asyncio.create_task(stack.client.complete(token_ids=LONG, max_tokens=4))
    await until(lambda load: load.queued_tokens > 0, stack)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await stack.assert_nothing_held(within_s=2.0)


async def test_cancel_during_decode(stack):
    stream = stack.client.generate(token_ids=PROMPT, max_tokens=1500, ignore_eos=True)
    seen = 0
    async for chunk in stream:
        seen += len(chunk.token_ids)
        if seen > 5:
            break
    await stream.aclose()
    await stack.assert_nothing_held(within_s=2.0)


async def test_a_client_that_vanishes_frees_everything(stack):
    """Its connection is cut without a word, as by a crash."""
    channel = grpc.aio.insecure_channel(stack.router.address)
    request = inference_pb2.GenerateRequest()
    request.tokens.ids.extend(PROMPT)
    request.sampling.max_tokens = 1500
    request.sampling.ignore_eos = True
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
    await call.read()
    await channel.close(grace=None)
    await stack.assert_nothing_held(within_s=2.0)


async def test_a_client_that_reads_nothing_loses_nothing(stack):
    async with grpc.aio.insecure_channel(stack.router.address) as channel:
        request = inference_pb2.GenerateRequest()
        request.tokens.ids.extend(PROMPT)
        request.sampling.max_tokens = 300
        request.sampling.ignore_eos = True
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60)
        await asyncio.sleep(1.5)  # the answer is long done
        slow = [token async for response in call for token in response.token_ids]
    fast = await stack.client.complete(token_ids=PROMPT, max_tokens=300, ignore_eos=True)
    assert tuple(slow) == fast.token_ids


async def test_a_prefill_worker_killed_during_prefill_is_only_a_pause(stack):
    expected = await stack.client.complete(token_ids=LONG[1:], max_tokens=4, ignore_eos=True)
    victim = stack.prefill[0]
    victim.process.send_signal(signal.SIGSTOP)  # so that it is certainly in the middle
    task = asyncio.create_task(stack.client.complete(token_ids=LONG[1:], max_tokens=4, ignore_eos=True, deadline_s=30))
    await asyncio.sleep(0.3)
    await victim.kill()
    stack.prefill.remove(victim)
    await stack.add("prefill")
    answer = await task
    assert answer.token_ids == expected.token_ids
    assert answer.stats.prefill_attempts == 2


async def test_a_decode_worker_killed_mid_stream_is_a_typed_error_within_two_seconds(stack):
    victim = stack.decode[0]
    stream = stack.client.generate(token_ids=PROMPT, max_tokens=1500, ignore_eos=True)
    with pytest.raises(errors.WorkerLost) as caught:
        async for chunk in stream:
            if chunk.token_ids and victim.alive:
                await victim.kill()
                killed = time.monotonic()
    assert time.monotonic() - killed < 2.0
    assert caught.value.stage == "decode"
    stack.decode.remove(victim)
    await stack.add("decode")


async def test_a_request_that_finds_no_worker_says_which_pool_is_empty(stack):
    victim = stack.decode.pop()
    await victim.stop()
    try:
        with pytest.raises(errors.NoWorkers, match="decode"):
            await stack.client.complete(token_ids=PROMPT, max_tokens=4, deadline_s=8)
    finally:
        await stack.add("decode")


async def test_requests_go_on_while_redis_is_killed_and_workers_tell_an_empty_one_everything_again(stack):
    keys = page_keys(await root_key(stack), PROMPT, 16)
    async with aclosing(RedisDirectoryReader(stack.valkey.url, "diptych")) as reader:
        held = {f"{d.worker_id}/{d.incarnation}": 6 for d in await stack.descriptions()}
        await until_found(reader, keys, held)
        enough = asyncio.Event()
        load = [asyncio.create_task(ask_until(enough, stack, [3 + n, *PROMPT])) for n in range(3)]
        await asyncio.sleep(0.3)

        os.kill(stack.valkey.pid, signal.SIGKILL)
        await asyncio.to_thread(stack.valkey.stop)  # removes its socket
        down = await stack.client.complete(token_ids=PROMPT[:50], max_tokens=8, ignore_eos=True)
        assert len(down.token_ids) == 8
        await asyncio.to_thread(stack.valkey.start)  # empty, at the same address

        await until_found(reader, keys, held)
        enough.set()
        for answers in await asyncio.gather(*load):
            assert len(answers) > 1
            assert len(set(answers)) == 1


async def root_key(stack) -> PageKey:
    description = (await stack.descriptions())[0]
    identity = description.fingerprint, PageFormat.from_proto(description.source.format)
    return ServedModel.load("tiny", stack.model).root_key("", identity)


async def until_found(reader, keys, held: dict[str, int], within_s=20.0) -> None:
    """Wait until the directory answers, and says that these workers hold so many of the pages."""
    deadline = time.monotonic() + within_s
    found: dict[str, int] = {}
    while not held.items() <= found.items():  # the dead are among those that are found
        assert time.monotonic() < deadline, f"{found} without {held}"
        await asyncio.sleep(0.05)
        with suppress(errors.MetadataUnavailable):
            found = await reader.lookup(keys)


async def ask_until(enough, stack, prompt) -> list[tuple[int, ...]]:
    """One request after the other; raises what makes one fail."""
    answers = []
    while not enough.is_set():
        answers.append((await stack.client.complete(token_ids=prompt, max_tokens=20, ignore_eos=True)).token_ids)
    return answers


async def test_a_router_that_is_killed_leaves_nothing_in_the_workers(stack):
    second = await stack.spawn("router", stack.router_configuration() | {"router_id": "router-1"})
    client = Client(second.address)
    stream = client.generate(token_ids=PROMPT, max_tokens=1500, ignore_eos=True)
    await anext(stream)
    await second.kill()
    with pytest.raises(errors.DiptychError):
        async for _ in stream:
            pass
    await client.close()
    await stack.assert_nothing_held(within_s=2.0)


async def until(condition, stack, within_s=5.0) -> None:
    """Wait until some worker's load fulfils the condition."""
    deadline = time.monotonic() + within_s
    while not any(condition(description.load) for description in await stack.descriptions()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def start(kind: str, stack: Stack, **settings) -> str:
    """Start a service that must fail; returns what it said."""
    base = stack.router_configuration() if kind == "router" else stack.worker_settings(kind)
    with pytest.raises(RuntimeError) as caught:
        await stack.spawn(kind, base | settings)
    return str(caught.value)


async def test_a_taken_port_is_named(stack):
    port = int(stack.router.address.rsplit(":", 1)[1])
    said = await start("router", stack, port=port)
    assert "port_taken" in said
    assert str(port) in said


@pytest.mark.parametrize("kind", ["router", "prefill"])
async def test_redis_down_at_start_is_named(stack, kind):
    said = await start(kind, stack, redis_url="redis://:secret@127.0.0.1:1/0")
    assert "metadata_unavailable" in said
    assert "127.0.0.1:1" in said
    assert "secret" not in said


@pytest.mark.parametrize("kind", ["router", "decode"])
async def test_a_model_that_is_not_there_is_named(stack, kind, tmp_path):
    said = await start(kind, stack, model=str(tmp_path / "nowhere"))
    assert "model_unusable" in said
    assert "nowhere" in said

"""The Python client against a router that a test plays."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from diptych.client import Client
from fake_router import FakeRouter
from protos import errors
from protos.v1 import common_pb2, inference_pb2
from rpc.server import RpcServer


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest_asyncio.fixture
async def server(router: FakeRouter) -> AsyncIterator[RpcServer]:
    server = await router.serve()
    yield server
    await server.stop(0)


@pytest_asyncio.fixture
async def client(server: RpcServer) -> AsyncIterator[Client]:
    async with Client(server.address) as client:
        yield client


async def test_chunks_come_as_they_are_and_the_last_one_sums_up(client):
    chunks = [chunk async for chunk in client.generate("hi")]
    assert [(chunk.text, chunk.token_ids) for chunk in chunks] == [("one", (1, 2)), (" two", (3,))]
    assert (chunks[0].finish_reason, chunks[0].usage, chunks[0].stats) == (None, None, None)
    last = chunks[-1]
    assert (last.finish_reason, last.usage.completion_tokens, last.stats.pages_handed_over) == ("stop", 3, 4)


async def test_complete_joins_the_chunks(client):
    answer = await client.complete("hi")
    assert (answer.text, answer.token_ids, answer.finish_reason, answer.request_id) == (
        "one two",
        (1, 2, 3),
        "stop",
        "r",
    )
    assert answer.usage.prompt_tokens == 5


async def test_log_probabilities_come_with_their_tokens(client, router):
    assert (await client.complete("hi")).logprobs == ()
    answer = await client.complete("hi", logprobs=2, prompt_logprobs=2)
    assert [one.token_id for one in answer.logprobs] == list(answer.token_ids)
    assert [one.token_id for one in answer.prompt_logprobs] == [7, 8]
    first = await anext(client.generate("hi", logprobs=2, prompt_logprobs=2))
    assert [one.token_id for one in first.logprobs] == [1, 2]
    assert (list(first.logprobs[0].top_ids), list(first.logprobs[0].top_logprobs)) == ([1, 9], [-0.5, -1.5])


async def test_all_options_reach_the_router(client, router):
    await client.complete(
        token_ids=[4, 5],
        model="m",
        request_id="mine",
        deadline_s=50,
        max_tokens=3,
        temperature=0.5,
        top_k=2,
        top_p=0.5,
        seed=2**63,
        stop=["x", "y"],
        stop_token_ids=[1],
        ignore_eos=True,
        min_p=0.25,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=0.5,
        logit_bias={3: -1.5},
        bad_words=["z"],
        bad_tokens=[[1, 2], [3]],
        min_tokens=2,
        logprobs=0,
        prompt_logprobs=4,
    )
    request = router.requests[0]
    assert (list(request.tokens.ids), request.model, request.request_id) == ([4, 5], "m", "mine")
    assert request.sampling == common_pb2.SamplingParams(
        max_tokens=3,
        temperature=0.5,
        top_k=2,
        top_p=0.5,
        seed=2**63,
        stop=["x", "y"],
        stop_token_ids=[1],
        ignore_eos=True,
        min_p=0.25,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=0.5,
        logit_bias={3: -1.5},
        bad_words=["z"],
        bad_tokens=[common_pb2.TokenSequence(ids=[1, 2]), common_pb2.TokenSequence(ids=[3])],
        min_tokens=2,
        logprobs=0,
        prompt_logprobs=4,
    )
    assert 40 < router.deadlines[0] < 51


async def test_what_is_left_out_is_left_to_the_router(client, router):
    await client.complete(messages=[{"role": "user", "content": "hi"}])
    request = router.requests[0]
    assert request.chat.messages[0] == inference_pb2.ChatMessage(role="user", content="hi")
    assert request.sampling == common_pb2.SamplingParams()
    assert not request.sampling.HasField("max_tokens")
    assert router.deadlines[0] is None or router.deadlines[0] > 1e6


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "prompt"),
        ({"text": "a", "token_ids": [1]}, "prompt"),
        ({"text": "\ud800"}, "prompt"),
        ({"token_ids": [-1]}, "prompt"),
        ({"token_ids": ["a"]}, "prompt"),
        ({"messages": [{"roll": "user"}]}, "prompt"),
        ({"messages": ["hi"]}, "prompt"),
        ({"text": "a", "max_token": 1}, "sampling"),
        ({"text": "a", "temperature": "hot"}, "sampling"),
        ({"text": "a", "seed": -1}, "sampling"),
        ({"text": "a", "logit_bias": {-1: 1.0}}, "sampling"),
        ({"text": "a", "logit_bias": {1: "a"}}, "sampling"),
        ({"text": "a", "bad_tokens": [1, 2]}, "sampling"),
        ({"text": "a", "bad_tokens": 1}, "sampling"),
        ({"text": "a", "bad_words": [1]}, "sampling"),
    ],
)
async def test_what_cannot_be_sent_names_its_field(client, router, options, field):
    with pytest.raises(errors.InvalidRequest) as caught:
        await client.complete(**options)
    assert caught.value.field == field
    assert not router.requests


@pytest.mark.parametrize("late", [False, True])
async def test_errors_are_typed(client, router, late):
    router.error, router.late = errors.Overloaded("full", retry_after_s=2.5, request_id="r"), late
    seen = []
    with pytest.raises(errors.Overloaded) as caught:
        async for chunk in client.generate("hi"):
            seen.append(chunk.text)
    assert (caught.value.retry_after_s, caught.value.stage, caught.value.request_id) == (2.5, "admission", "r")
    assert seen == (["one"] if late else [])


async def test_no_router_is_told_with_its_endpoint(unused_tcp_port):
    async with Client(f"127.0.0.1:{unused_tcp_port}") as client:
        for call in (client.complete("hi"), client.tokenize("hi"), client.list_models()):
            with pytest.raises(errors.WorkerLost, match=f"127.0.0.1:{unused_tcp_port}"):
                await call


async def test_a_deadline_ends_the_stream(client, router):
    router.hang = True
    with pytest.raises(errors.DeadlineExceeded):
        await client.complete("hi", deadline_s=0.2)
    await asyncio.wait_for(router.cancelled.wait(), 5)


async def test_closing_the_generator_cancels(client, router):
    router.hang = True
    stream = client.generate("hi")
    assert (await anext(stream)).text == "one"
    await stream.aclose()
    await asyncio.wait_for(router.cancelled.wait(), 5)


async def test_cancelling_the_reader_cancels(client, router):
    router.hang = True
    task = asyncio.create_task(client.complete("hi"))
    await asyncio.wait_for(router.called.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(router.cancelled.wait(), 5)


async def test_tokenize_and_models(client, router):
    assert await client.tokenize("hi") == [7, 8]
    assert router.requests[0].text == "hi"
    assert [model.id for model in await client.list_models()] == ["m"]
    router.error = errors.UnknownModel("no such model")
    with pytest.raises(errors.UnknownModel):
        await client.tokenize(messages=[], model="x")
    with pytest.raises(errors.UnknownModel):
        await client.list_models()


async def test_the_example_runs(server, tmp_path):
    source = (Path(__file__).parent.parent / "examples" / "client.py").read_text()
    program = tmp_path / "client.py"
    program.write_text(source.replace("127.0.0.1:50051", server.address))
    run = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", str(program), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert await asyncio.wait_for(run.communicate(), 60) == (b"one two\n", b"")


def test_the_client_needs_nothing_that_serves():
    """Base dependencies only; and the package alone does not even import grpc."""
    absent = {"ray", "torch", "numpy", "redis", "grpc_health", "grpc_reflection", "uvloop", "psutil", "tokenizers"}
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"  # importing them is an error now
        "import diptych; assert 'grpc' not in sys.modules\n"
        "from diptych import Client\n"
        "Client('127.0.0.1:1')"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)

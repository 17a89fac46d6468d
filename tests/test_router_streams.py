"""What a client gets that reads fast, slowly or not at all."""

import asyncio

import pytest

from protos import errors
from protos.v1 import common_pb2, inference_pb2
from router.streams import PROMPT_TOKENS, Summary, TokenStream

SUMMARY = Summary(
    common_pb2.FINISH_REASON_LENGTH,
    inference_pb2.Usage(prompt_tokens=4, completion_tokens=3),
    inference_pb2.RequestStats(prefill_ms=5.0),
)


async def collect(stream: TokenStream) -> list[tuple[list[int], str, int]]:
    return [(list(m.token_ids), m.text, m.finish_reason) async for m in stream.messages()]


async def test_what_waits_is_merged_into_one_message():
    stream = TokenStream("r")
    stream.push([1], "a")
    stream.push([2, 3], "bc")
    stream.finish(SUMMARY)
    assert await collect(stream) == [([1, 2, 3], "abc", common_pb2.FINISH_REASON_LENGTH)]


async def test_a_fast_client_gets_each_token_by_itself():
    stream = TokenStream("r")
    reading = asyncio.create_task(collect(stream))
    for token in (1, 2):
        stream.push([token], str(token))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    stream.finish(SUMMARY)
    assert await reading == [([1], "1", 0), ([2], "2", 0), ([], "", common_pb2.FINISH_REASON_LENGTH)]


async def test_the_last_message_alone_has_the_summary():
    stream = TokenStream("r")
    reading = asyncio.create_task(anext(stream.messages()))
    stream.push([1], "a")
    first = await reading
    assert not first.HasField("usage")
    stream.finish(SUMMARY)
    (last,) = [message async for message in stream.messages()]
    assert (last.usage, last.stats, last.request_id) == (SUMMARY.usage, SUMMARY.stats, "r")


async def test_an_error_comes_after_the_tokens_that_came_before_it():
    stream = TokenStream("r")
    stream.push([1], "a")
    stream.fail(errors.WorkerLost("gone"))
    messages = stream.messages()
    assert list((await anext(messages)).token_ids) == [1]
    with pytest.raises(errors.WorkerLost):
        await anext(messages)


async def test_an_error_by_itself_is_no_message():
    stream = TokenStream("r")
    stream.fail(errors.WorkerLost("gone"))
    with pytest.raises(errors.WorkerLost):
        await anext(stream.messages())


async def test_the_first_end_counts():
    stream = TokenStream("r")
    stream.finish(SUMMARY)
    stream.fail(errors.WorkerLost("too late"))
    assert len(await collect(stream)) == 1


def scores(first, count):
    return [common_pb2.TokenLogprobs(token_id=token) for token in range(first, first + count)]


async def test_log_probabilities_go_with_their_tokens():
    stream = TokenStream("r")
    stream.push_prompt(scores(50, 2))
    stream.push([1], "", scores(1, 1))
    stream.push([2, 3], "bc", scores(2, 2))
    messages = stream.messages()
    first = await anext(messages)
    assert list(first.token_ids) == [1, 2, 3] == [one.token_id for one in first.logprobs]
    assert [one.token_id for one in first.prompt_logprobs] == [50, 51]
    stream.push([4], "d", scores(4, 1))
    second = await anext(messages)
    assert [one.token_id for one in second.logprobs] == [4]
    assert not second.prompt_logprobs


async def test_those_of_a_long_prompt_take_several_messages_before_the_first_token():
    stream = TokenStream("r")
    stream.push_prompt(scores(0, 2 * PROMPT_TOKENS + 5))
    stream.push([1], "a", scores(1, 1))
    stream.finish(SUMMARY)
    messages = [message async for message in stream.messages()]
    assert [len(m.prompt_logprobs) for m in messages] == [PROMPT_TOKENS, PROMPT_TOKENS, 5]
    assert [one.token_id for m in messages for one in m.prompt_logprobs] == list(range(2 * PROMPT_TOKENS + 5))
    assert [list(m.token_ids) for m in messages] == [[], [], [1]]
    assert messages[-1].finish_reason


async def test_tokens_without_text_are_sent_and_nothing_is_not():
    stream = TokenStream("r")
    reading = asyncio.create_task(collect(stream))
    stream.push([1], "")  # a part of a character
    await asyncio.sleep(0.01)
    stream.push([], "")
    await asyncio.sleep(0.01)
    stream.finish(SUMMARY)
    assert [ids for ids, _, _ in await reading] == [[1], []]

"""Prefixes that another worker holds, on real processes: fetched where that helps, computed where it does not work."""

import asyncio
import random
import signal
import time

import grpc.aio
import pytest
import pytest_asyncio

from engine.config import EngineConfig
from engine.loader import load_model
from engine.sampling_params import SamplingParams
from engine_alone import make_engine, run
from protos.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from stack import Stack
from tiny_model import make_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")
ENGINE = EngineConfig(page_size=16, num_pages=400, token_budget=64, max_sequences=8, dtype="float32")
RANDOM = random.Random(5)
FIRST = RANDOM.choices(range(3, 250), k=600)  # 37 full pages
LONGER = FIRST + RANDOM.choices(range(3, 250), k=600)  # 75
ANSWER = {"max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(model):
    """Two prefill workers; one of them has computed both prompts, and drains."""
    async with Stack(model, 2, 1, ENGINE) as stack:
        [holder] = {await first_token(stack, FIRST), await first_token(stack, LONGER)}
        stack.holder = next(worker for worker in stack.prefill if worker.name == holder)
        stack.other = next(worker for worker in stack.prefill if worker.name != holder)
        async with grpc.aio.insecure_channel(stack.holder.address) as channel:
            await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(), timeout=10)
        while await first_token(stack, [7, 8, 9]) == holder:  # the router hears of it within two seconds
            await asyncio.sleep(0.1)
        yield stack
        stack.holder.process.send_signal(signal.SIGCONT)


async def first_token(stack, prompt) -> str:
    """Who computed the prompt. There is no answer behind its first token, so decode never gets the pages."""
    await asyncio.sleep(0.2)  # what was sealed before is announced by then
    return (await stack.client.complete(token_ids=prompt, max_tokens=1)).stats.prefill_worker


def clean(model, prompt) -> list[int]:
    """What one engine by itself answers."""
    params = SamplingParams.from_proto(common_pb2.SamplingParams(**ANSWER), default_seed=0)
    [sequence] = run(make_engine(load_model(model, "float32", "cpu").model), [(prompt, params)], ends=())
    return sequence.tokens[len(prompt) :]


async def test_pages_of_a_worker_that_drains_are_fetched_and_give_the_same_tokens(stack, model):
    answer = await stack.client.complete(token_ids=FIRST, **ANSWER)
    stats = answer.stats
    assert (stats.prefill_worker, stats.prefill_fetched_pages, stats.prefill_prefix_pages) == (stack.other.name, 37, 0)
    assert stats.queue_ms >= stats.fetch_ms > 0
    assert stats.pages_handed_over == 38  # and the fetched pages went on to decode
    assert list(answer.token_ids) == clean(model, FIRST)
    again = await stack.client.complete(token_ids=FIRST, **ANSWER)
    assert (again.stats.prefill_fetched_pages, again.stats.prefill_prefix_pages) == (0, 37)
    await stack.assert_nothing_held()


async def test_a_holder_that_does_not_answer_is_a_pause_and_the_prompt_is_computed(stack, model):
    stack.holder.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    answer = await stack.client.complete(token_ids=LONGER, **ANSWER)
    took = time.monotonic() - began
    stack.holder.process.send_signal(signal.SIGCONT)
    stats = answer.stats
    assert (stats.prefill_worker, stats.prefill_fetched_pages, stats.prefill_prefix_pages) == (stack.other.name, 0, 37)
    assert stats.fetch_ms > 0  # it was tried
    assert took < 10.0
    assert list(answer.token_ids) == clean(model, LONGER)
    await stack.assert_nothing_held()

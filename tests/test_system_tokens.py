"""The whole path gives the tokens that the model gives: real processes, a real Valkey, real weights."""

import asyncio
import random

import pytest
import pytest_asyncio

from engine.config import EngineConfig
from engine.tokenizer import Tokenizer
from oracle import greedy_choices
from stack import Stack
from tiny_model import make_tiny_model

ANSWER = 40


async def answer(stack: Stack, token_ids, **options) -> list[int]:
    """All token ids of one streamed answer."""
    ids: list[int] = []
    async for chunk in stack.client.generate(token_ids=token_ids, ignore_eos=True, **options):
        ids += chunk.token_ids
    return ids


@pytest.fixture(scope="module")
def prompts(demo_model) -> list[list[int]]:
    """20 prompts of 10 to 600 tokens; some share a prefix."""
    words = (
        "the river kept its own time and the town kept another until a bridge was built of stone and argument "
        "where merchants weighed salt against promises while children counted boats that never came back in spring"
    ).split()
    rng = random.Random(7)
    tokenizer = Tokenizer.from_dir(demo_model.path)
    story = tokenizer.encode(" ".join(rng.choice(words) for _ in range(900)))
    lengths = [10, 15, 16, 17, 31, 32, 48, 63, 64, 65, 100, 128, 150, 200, 256, 300, 400, 512, 599, 600]
    starts = [0 if index % 3 == 0 else rng.randrange(250) for index in range(len(lengths))]
    return [story[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("workers", "page_size", "budget", "transports"),
    [(1, 16, 96, ("shm",)), (2, 64, 512, ("tcp",))],
    ids=["1+1, pages of 16, small chunks, shm", "2+2, pages of 64, tcp"],
)
async def test_greedy_tokens_equal_transformers(demo_model, prompts, workers, page_size, budget, transports):
    engine = EngineConfig(page_size=page_size, num_pages=12800 // page_size, token_budget=budget, dtype="float32")
    async with Stack(demo_model.path, workers, workers, engine, transports) as stack:
        answers = await asyncio.gather(
            *(answer(stack, prompt, max_tokens=ANSWER, deadline_s=300) for prompt in prompts)
        )
        again = await answer(stack, prompts[-1], max_tokens=ANSWER)  # now from pages that both pools kept
        assert again == answers[-1]
        await stack.assert_nothing_held()
    for prompt, ids in zip(prompts, answers, strict=True):
        assert len(ids) == ANSWER
        assert ids == greedy_choices(demo_model.path, prompt, ids)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    async with Stack(model, 2, 2, EngineConfig(page_size=16, num_pages=256, token_budget=64, dtype="float32")) as stack:
        yield stack


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_64_requests_at_once_equal_their_own_runs_alone(tiny, temperature):
    rng = random.Random(11)
    shared = [rng.randrange(3, 250) for _ in range(80)]
    jobs = []
    for index in range(64):
        prompt = shared[: rng.choice([0, 40, 80])] + [rng.randrange(3, 250) for _ in range(rng.randrange(1, 200))]
        options = {"max_tokens": rng.randrange(1, 60), "temperature": temperature, "top_p": 0.9, "seed": index}
        jobs.append((prompt, options))
    together = await asyncio.gather(*(answer(tiny, prompt, **options) for prompt, options in jobs))
    for (prompt, options), ids in zip(jobs, together, strict=True):
        assert len(ids) == options["max_tokens"]
        assert ids == await answer(tiny, prompt, **options)
    await tiny.assert_nothing_held()


@pytest.mark.asyncio(loop_scope="module")
async def test_streamed_text_is_the_text_of_the_ids(tiny):
    ids, text = [], ""
    async for chunk in tiny.client.generate(text="ünïcödé 🙂", max_tokens=50, temperature=1.5, seed=3, ignore_eos=True):
        ids += chunk.token_ids
        text += chunk.text
    assert len(ids) == 50
    assert text == Tokenizer.from_dir(tiny.model).decode(ids)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_last_message_tells_where_the_time_went(tiny):
    prompt = list(range(3, 103))
    chunks = [chunk async for chunk in tiny.client.generate(token_ids=prompt, max_tokens=5, ignore_eos=True)]
    stats, usage = chunks[-1].stats, chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (100, 5)
    assert stats.prompt_pages == 6
    assert stats.pages_handed_over == 7  # six full pages and the tail
    assert stats.bytes_handed_over == 7 * 2 * 2 * 2 * 16 * 16 * 4
    assert 0 <= stats.queue_ms <= stats.first_token_ms
    assert stats.prefill_ms > 0
    chunks = [chunk async for chunk in tiny.client.generate(token_ids=prompt, max_tokens=5, ignore_eos=True)]
    again = chunks[-1].stats
    assert again.prefill_worker == stats.prefill_worker, "placement should prefer the worker that holds the prefix"
    assert again.prefill_prefix_pages == 6
    assert again.decode_worker == stats.decode_worker, "and the one that need not be sent it"
    assert (again.decode_prefix_pages, again.pages_handed_over) == (6, 1)

"""Every sampling option goes through the whole path: the answers are those of one engine by itself."""

import asyncio
import random

import pytest
import pytest_asyncio

from diptych.client import Completion
from engine.config import EngineConfig
from engine.loader import load_model
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from engine_alone import make_engine, run
from protos.v1 import common_pb2
from router.bad_words import with_bad_words
from stack import Stack
from tiny_model import EOS_ID, make_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = random.Random(3).choices(range(3, 250), k=70)
DRAWN = {"max_tokens": 30, "temperature": 1.0, "seed": 11}
OPTIONS = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 2.0},
    "logit_bias": {"logit_bias": {50: 4.0, 60: 3.5, EOS_ID: -100.0}},
    "bad_tokens": {"bad_tokens": [[token] for token in range(3, 200)]},
    "bad_words": {"bad_words": ["a", "e", "the"], "logit_bias": {67: 9.0, 71: 9.0}},
    "min_tokens": {"min_tokens": 25, "logit_bias": {EOS_ID: 6.0}},
    "greedy with penalties": {"temperature": 0.0, "frequency_penalty": 2.0, "presence_penalty": 0.5},
    "all together": {
        "temperature": 1.4,
        "top_k": 100,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.2,
        "logit_bias": {70: 2.0, EOS_ID: 3.0},
        "bad_words": ["the"],
        "min_tokens": 10,
    },
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    engine = EngineConfig(page_size=16, num_pages=256, token_budget=64, dtype="float32")
    async with Stack(model, 1, 1, engine, verify="checksum") as stack:
        yield stack
        await stack.assert_nothing_held()


@pytest.fixture(scope="module")
def alone(stack):
    """Answers a prompt in an engine of its own: the sequence."""
    model, tokenizer = load_model(stack.model, "float32", "cpu").model, Tokenizer.from_dir(stack.model)

    def answer(options, prompt=PROMPT):
        fields = dict(options)
        fields["bad_tokens"] = [common_pb2.TokenSequence(ids=ids) for ids in fields.get("bad_tokens", [])]
        params = SamplingParams.from_proto(common_pb2.SamplingParams(**fields), default_seed=0)
        ends = [] if params.ignore_eos else [EOS_ID]
        return run(make_engine(model), [(prompt, with_bad_words(params, tokenizer))], ends)[0]

    return answer


def assert_same(answer: Completion, sequence) -> None:
    assert list(answer.token_ids) == sequence.tokens[sequence.prompt_len :]
    for ours, theirs in ((answer.logprobs, sequence.logprobs), (answer.prompt_logprobs, sequence.prompt_logprobs)):
        assert [one.token_id for one in ours] == [one.token_id for one in theirs]
        assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-4)
        assert [list(one.top_ids) for one in ours] == [list(one.top_ids) for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert list(one.top_logprobs) == pytest.approx(list(other.top_logprobs), abs=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
async def test_each_option_reaches_both_workers(stack, alone, name):
    options = DRAWN | OPTIONS[name] | {"logprobs": 3}
    answer = await stack.client.complete(token_ids=PROMPT, **options)
    assert_same(answer, alone(options))
    plain = await stack.client.complete(token_ids=PROMPT, **DRAWN)
    assert answer.token_ids != plain.token_ids, "the option changes nothing here: the test shows nothing"


async def test_the_first_token_obeys_the_rules_too(stack):
    """It is sampled by the prefill worker, all others by the decode worker."""
    plain = await stack.client.complete(token_ids=PROMPT, max_tokens=1, logprobs=2)
    first, second = plain.logprobs[0].top_ids
    assert plain.token_ids == (first,)
    for options in ({"bad_tokens": [[first]]}, {"bad_tokens": [[PROMPT[-1], first]]}, {"logit_bias": {first: -100.0}}):
        assert (await stack.client.complete(token_ids=PROMPT, max_tokens=1, **options)).token_ids == (second,)
    ended = await stack.client.complete(token_ids=PROMPT, max_tokens=9, logit_bias={EOS_ID: 100.0})
    assert ended.token_ids == (EOS_ID,)
    later = await stack.client.complete(token_ids=PROMPT, max_tokens=9, logit_bias={EOS_ID: 100.0}, min_tokens=1)
    assert later.token_ids == (first, EOS_ID)


@pytest.mark.parametrize("top", [0, 4, 20])
async def test_log_probabilities_of_prompt_and_answer_come_back(stack, alone, top):
    options = DRAWN | {"logprobs": top, "prompt_logprobs": top, "ignore_eos": True}
    sequence = alone(options)
    for _ in range(2):  # the second time the prompt's pages are held by both workers
        answer = await stack.client.complete(token_ids=PROMPT, **options)
        assert_same(answer, sequence)
        assert [len(one.top_ids) for one in (*answer.prompt_logprobs, *answer.logprobs)] == [top] * 99
        assert answer.stats.prefill_prefix_pages == 0
    assert answer.stats.decode_prefix_pages == 4


async def test_a_prompt_alone_can_be_scored(stack, alone):
    answer = await stack.client.complete(token_ids=PROMPT, max_tokens=1, prompt_logprobs=0)
    assert not answer.logprobs
    assert_same(answer, alone({"max_tokens": 1, "prompt_logprobs": 0}))


async def test_nothing_comes_that_was_not_asked_for(stack):
    answer = await stack.client.complete(token_ids=PROMPT, **DRAWN)
    assert (answer.logprobs, answer.prompt_logprobs) == ((), ())


async def test_the_same_seed_gives_the_same_answer_in_any_batch(stack, alone):
    """All kinds at once, against each by itself in another engine."""
    rng = random.Random(8)
    jobs = []
    for index in range(40):
        prompt = PROMPT[: rng.choice([0, 32, 64])] + [rng.randrange(3, 250) for _ in range(rng.randrange(1, 90))]
        options = DRAWN | rng.choice(list(OPTIONS.values())) | {"seed": index, "max_tokens": rng.randrange(26, 50)}
        jobs.append((prompt, options | rng.choice([{}, {"logprobs": 2}, {"prompt_logprobs": 1}])))
    answers = await asyncio.gather(*(stack.client.complete(token_ids=prompt, **options) for prompt, options in jobs))
    for (prompt, options), answer in zip(jobs, answers, strict=True):
        assert_same(answer, alone(options, prompt))

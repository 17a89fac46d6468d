"""What is refused before any worker hears of it, and what is made of what is not."""

import math
import sys

import pytest

from kvstore.keys import unpack_tokens
from protos import errors
from protos.v1 import common_pb2, inference_pb2
from router.admission import Admission, Limits
from router.prompt import PromptReader
from router.served_model import ServedModel
from router.tenant import Tenant
from router_rig import with_prompt
from tiny_model import EOS_ID, make_tiny_model

CONTEXT = 2048
TENANT = Tenant("secret")
NO_LIMITS = Limits(sys.maxsize, sys.maxsize)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ServedModel.load("tiny", make_tiny_model(tmp_path_factory.mktemp("model"), max_positions=CONTEXT))


@pytest.fixture
def admission(model):
    prompts = PromptReader(model, max_bytes=4 * 1024 * 1024)
    yield Admission(model, prompts, 2, lambda: NO_LIMITS, lambda: 3.25)
    prompts.close()


def request(prompt="hello", model="tiny", **sampling) -> inference_pb2.GenerateRequest:
    return with_prompt(
        inference_pb2.GenerateRequest(model=model, sampling=common_pb2.SamplingParams(**sampling)), prompt
    )


BAD = {
    "no prompt": (inference_pb2.GenerateRequest(), "prompt"),
    "empty text": (request(""), "text"),
    "no tokens": (inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds()), "tokens"),
    "no messages": (inference_pb2.GenerateRequest(chat=inference_pb2.ChatPrompt()), "chat"),
    "a role that is not one": (request([("user", "hi"), ("wizard", "hi")]), "chat.messages[1].role"),
    "an id out of range": (request([5, 6, 100_000]), "tokens"),
    "more ids than the context": (request([5] * (CONTEXT + 1)), "prompt"),
    "a prompt that leaves no room": (request([5] * CONTEXT), "prompt"),
    "text of too many tokens": (request("a b " * CONTEXT), "prompt"),
    "10 MB of text": (request("a" * 10_000_000), "text"),
    "10 MB of chat": (request([("user", "a" * 5_000_000), ("user", "a" * 5_000_000)]), "chat"),
    "text too long in bytes only": (request("ü" * 3_000_000), "text"),
    "negative temperature": (request(temperature=-0.1), "temperature"),
    "high temperature": (request(temperature=2.5), "temperature"),
    "temperature NaN": (request(temperature=math.nan), "temperature"),
    "temperature infinite": (request(temperature=math.inf), "temperature"),
    "top_p 0": (request(top_p=0.0), "top_p"),
    "top_p above 1": (request(top_p=1.5), "top_p"),
    "top_p NaN": (request(top_p=math.nan), "top_p"),
    "negative top_k": (request(top_k=-1), "top_k"),
    "max_tokens 0": (request(max_tokens=0), "max_tokens"),
    "max_tokens negative": (request(max_tokens=-5), "max_tokens"),
    "max_tokens past the context": (request([5] * 100, max_tokens=CONTEXT - 99), "max_tokens"),
    "an empty stop string": (request(stop=[""]), "stop"),
    "a million stop ids": (request(stop_token_ids=[5] * 1_000_000), "sampling"),
    "a million messages": (request([("user", "")] * 1_000_000), "chat"),
    "a stop id out of range": (request(stop_token_ids=[100_000]), "stop_token_ids"),
    "min_p above 1": (request(min_p=1.5), "min_p"),
    "repetition penalty 0": (request(repetition_penalty=0.0), "repetition_penalty"),
    "frequency penalty NaN": (request(frequency_penalty=math.nan), "frequency_penalty"),
    "presence penalty of 3": (request(presence_penalty=3.0), "presence_penalty"),
    "a bias out of bounds": (request(logit_bias={5: 101.0}), "logit_bias"),
    "a bias for an id out of range": (request(logit_bias={100_000: 1.0}), "logit_bias"),
    "a bias for too many ids": (request(logit_bias=dict.fromkeys(range(1025), 1.0)), "logit_bias"),
    "an empty bad word": (request(bad_words=[""]), "bad_words"),
    "a bad word of too many tokens": (request(bad_words=["ü" * 20]), "bad_words"),
    "an empty run of bad tokens": (request(bad_tokens=[common_pb2.TokenSequence()]), "bad_tokens"),
    "a bad token out of range": (request(bad_tokens=[common_pb2.TokenSequence(ids=[5, 100_000])]), "bad_tokens"),
    "min_tokens above max_tokens": (request(min_tokens=9, max_tokens=8), "min_tokens"),
    "min_tokens above what is left": (request([5] * (CONTEXT - 8), min_tokens=9), "min_tokens"),
    "21 log-probabilities": (request(logprobs=21), "logprobs"),
    "-1 log-probabilities of the prompt": (request(prompt_logprobs=-1), "prompt_logprobs"),
    "every token forbidden": (
        request(
            bad_tokens=[common_pb2.TokenSequence(ids=[token]) for token in range(250)],
            stop_token_ids=range(250, 312),
            min_tokens=1,
        ),
        "bad_tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_what_is_wrong_is_refused_with_its_field(admission, case):
    message, field = BAD[case]
    with pytest.raises(errors.InvalidRequest) as caught:
        await admission.admit(message, "r", TENANT)
    assert caught.value.field == field
    assert caught.value.stage == "admission"


async def test_text_that_is_too_large_is_refused_unread(admission, monkeypatch):
    monkeypatch.setattr("engine.tokenizer.Tokenizer.encode", lambda *_: pytest.fail("it was tokenized"))
    for text in ("a" * 10_000_000, "ü" * 3_000_000):
        with pytest.raises(errors.InvalidRequest):
            await admission.admit(request(text), "r", TENANT)


async def test_an_unknown_model_is_refused_by_name(admission):
    with pytest.raises(errors.UnknownModel, match="gpt-9"):
        await admission.admit(request(model="gpt-9"), "r", TENANT)


@pytest.mark.parametrize("name", ["", "tiny"])
async def test_the_model_may_be_left_out(admission, name):
    assert (await admission.admit(request(model=name), "r", TENANT)).prompt_tokens == 5


async def test_text_chat_and_ids_become_ids(admission, model):
    text = await admission.admit(request("hello"), "r", TENANT)
    assert unpack_tokens(text.token_ids) == model.tokenizer.encode("hello")
    chat = await admission.admit(request([("user", "hello")]), "r", TENANT)
    assert unpack_tokens(chat.token_ids) == model.tokenizer.apply_chat([{"role": "user", "content": "hello"}])
    ids = await admission.admit(request([7, 8, 9]), "r", TENANT)
    assert unpack_tokens(ids.token_ids) == [7, 8, 9]


async def test_long_text_and_chat_are_tokenized_alike(admission, model):
    text = "the water of the river " * 150
    admitted = await admission.admit(request(text), "r", TENANT)
    assert unpack_tokens(admitted.token_ids) == model.tokenizer.encode(text)
    admitted = await admission.admit(request([("user", text)]), "r", TENANT)
    assert unpack_tokens(admitted.token_ids) == model.tokenizer.apply_chat([{"role": "user", "content": text}])


async def test_end_ids_are_the_models_and_the_requests(admission):
    assert (await admission.admit(request(stop_token_ids=[9]), "r", TENANT)).end_ids == {EOS_ID, 9}
    assert (await admission.admit(request(stop_token_ids=[9], ignore_eos=True), "r", TENANT)).end_ids == {9}


async def test_bad_words_become_runs_of_ids(admission, model):
    admitted = await admission.admit(
        request(bad_words=["the"], bad_tokens=[common_pb2.TokenSequence(ids=[9])]), "r", TENANT
    )
    assert admitted.sampling.bad_words == ()
    assert admitted.sampling.bad_tokens == ((9,), *(tuple(model.tokenizer.encode_part(t)) for t in ("the", " the")))


async def test_the_default_of_max_tokens_makes_room_for_min_tokens(admission):
    admitted = await admission.admit(request([5] * (CONTEXT - 8), min_tokens=8), "r", TENANT)
    assert (admitted.sampling.min_tokens, admitted.sampling.max_tokens) == (8, 8)


async def test_a_seed_is_kept_or_drawn(admission):
    assert (await admission.admit(request(seed=2**64 - 1), "r", TENANT)).sampling.seed == 2**64 - 1
    assert (await admission.admit(request(seed=0), "r", TENANT)).sampling.seed == 0
    drawn = {(await admission.admit(request(), "r", TENANT)).sampling.seed for _ in range(3)}
    assert len(drawn) == 3


async def test_max_tokens_that_just_fit_are_kept(admission):
    admitted = await admission.admit(request([5] * 100, max_tokens=CONTEXT - 100), "r", TENANT)
    assert admitted.sampling.max_tokens == CONTEXT - 100


async def test_the_default_of_max_tokens_shrinks_to_the_context(admission):
    assert (await admission.admit(request([5] * (CONTEXT - 3)), "r", TENANT)).sampling.max_tokens == 3


@pytest.mark.parametrize(
    ("limits", "prompt", "max_tokens", "field"),
    [
        (Limits(prefill=101, decode=1000), 100, 4, None),
        (Limits(prefill=100, decode=1000), 100, 4, "prompt"),
        (Limits(prefill=1000, decode=100), 100, 4, "prompt"),
        (Limits(prefill=1000, decode=104), 100, 4, None),
        (Limits(prefill=1000, decode=103), 100, 4, "max_tokens"),
    ],
)
async def test_what_no_worker_can_ever_hold_is_refused(model, limits, prompt, max_tokens, field):
    prompts = PromptReader(model, 1000)
    admission = Admission(model, prompts, 2, lambda: limits, lambda: 0.0)
    message = request([5] * prompt, max_tokens=max_tokens)
    if field is None:
        assert (await admission.admit(message, "r", TENANT)).sampling.max_tokens == max_tokens
    else:
        with pytest.raises(errors.InvalidRequest) as caught:
            await admission.admit(message, "r", TENANT)
        assert caught.value.field == field
    prompts.close()


def test_places_are_counted_and_given_back(admission):
    with admission.slot("a"), admission.slot("b"):
        with pytest.raises(errors.Overloaded, match=r"3\.2 s") as caught, admission.slot("c"):
            pass
        assert caught.value.retry_after_s == 3.25
    assert not admission.inflight
    with pytest.raises(KeyError), admission.slot("a"):
        raise KeyError
    assert not admission.inflight


@pytest.mark.parametrize("bad", ["x" * 129, "line\nbreak", "nul\0"])
def test_an_unfit_request_id_is_refused(admission, bad):
    with pytest.raises(errors.InvalidRequest) as caught, admission.slot(bad):
        pass
    assert caught.value.field == "request_id"

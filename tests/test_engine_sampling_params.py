"""Every field is checked, and the message carries every field."""

import dataclasses
import math

import pytest

from engine.sampling_params import SamplingParams
from protos.errors import InvalidRequest
from protos.v1 import common_pb2

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 1},
        {"max_tokens": 2**31 - 1},
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"temperature": 1},
        {"temperature": 1e-30},
        {"top_k": 0},
        {"top_k": 2**31 - 1},
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"stop": ("a",) * 16},
        {"stop": ("é" * 512,)},
        {"stop_token_ids": (0, 2**32 - 1)},
        {"stop_token_ids": tuple(range(256))},
        {"ignore_eos": True},
        *({"min_p": value} for value in (0.0, 0.5, 1.0, 1)),
        *({"repetition_penalty": value} for value in (1e-3, 1, 10.0)),
        *({name: value} for name in ("frequency_penalty", "presence_penalty") for value in (-2.0, 0, 2.0)),
        {"logit_bias": ((0, -100.0), (2**32 - 1, 100))},
        {"logit_bias": tuple((token, 0.5) for token in range(1024))},
        {"bad_words": ("é" * 128,) * 64},
        {"bad_tokens": ((1,), tuple(range(32)))},
        {"bad_tokens": ((7,),) * 256},
        {"min_tokens": 256},
        {"min_tokens": 7, "max_tokens": 7},
        *({name: value} for name in ("logprobs", "prompt_logprobs") for value in (None, 0, 20)),
    ],
    ids=str,
)
def test_what_is_allowed(fields):
    SamplingParams(**fields).validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_tokens", value) for value in (0, -1, 2**31, 1.5, True, NAN, "1", None)),
        *(("temperature", value) for value in (-0.1, 2.1, NAN, INF, -INF, "1", True, None)),
        *(("top_k", value) for value in (-1, 2**31, 0.5, True, NAN)),
        *(("top_p", value) for value in (0.0, -0.1, 1.1, NAN, INF, -INF, "1", None)),
        *(("seed", value) for value in (-1, 2**64, 0.5, True)),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
        ("stop", ("a" * 513,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (2**32,)),
        ("stop_token_ids", (1.5,)),
        ("stop_token_ids", tuple(range(257))),
        *(("min_p", value) for value in (-0.1, 1.1, NAN, INF, "1", True, None)),
        *(("repetition_penalty", value) for value in (0.0, -1.0, 10.1, NAN, INF, "1", True, None)),
        *((name, v) for name in ("frequency_penalty", "presence_penalty") for v in (-2.1, 2.1, NAN, -INF, "1", True)),
        *(("logit_bias", ((5, value),)) for value in (-100.1, 100.1, NAN, INF, "1", True)),
        *(("logit_bias", ((token, 1.0),)) for token in (-1, 2**32, 0.5, "5")),
        ("logit_bias", tuple((token, 0.5) for token in range(1025))),
        *(("bad_words", value) for value in (("",), ("a",) * 65, ("a" * 129,))),
        *(("bad_tokens", value) for value in (((),), ((7,),) * 257, (tuple(range(33)),), ((-1,),), ((2**32,),))),
        *(("min_tokens", value) for value in (-1, 257, 0.5, True, NAN)),
        *((name, value) for name in ("logprobs", "prompt_logprobs") for value in (-1, 21, 0.5, True, NAN, "1")),
    ],
    ids=str,
)
def test_what_is_refused(field, value):
    with pytest.raises(InvalidRequest, match=field) as raised:
        SamplingParams(**{field: value}).validate()
    assert raised.value.field == field
    assert raised.value.stage == "admission"


def test_an_empty_message_gives_the_defaults():
    params = SamplingParams.from_proto(common_pb2.SamplingParams(), default_seed=77)
    assert params == SamplingParams(seed=77)
    assert params.greedy


def test_zeros_that_were_set_are_not_defaults():
    message = common_pb2.SamplingParams(max_tokens=0, temperature=0.0, top_k=0, top_p=0.0, seed=0)
    params = SamplingParams.from_proto(message, default_seed=77)
    assert (params.max_tokens, params.top_p, params.seed) == (0, 0.0, 0)


def test_the_message_carries_every_field():
    params = SamplingParams(
        max_tokens=7,
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        seed=2**64 - 1,
        stop=("a", "🙂"),
        stop_token_ids=(3, 2**32 - 1),
        ignore_eos=True,
        min_p=0.25,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=2.0,
        logit_bias=((3, -0.5), (2**32 - 1, 100.0)),
        bad_words=("a", "🙂"),
        bad_tokens=((1,), (2, 2**32 - 1)),
        min_tokens=3,
        logprobs=0,
        prompt_logprobs=20,
    )
    assert all(getattr(params, f.name) != f.default for f in dataclasses.fields(SamplingParams))
    message = common_pb2.SamplingParams.FromString(params.to_proto().SerializeToString())
    assert SamplingParams.from_proto(message, default_seed=1) == params


def test_going_through_the_message_twice_changes_nothing_more():
    """Both workers must draw alike: float32 rounds 0.7 and 0.9 once."""
    once = SamplingParams.from_proto(SamplingParams(temperature=0.7, top_p=0.9).to_proto(), default_seed=0)
    assert once.temperature == pytest.approx(0.7)
    assert SamplingParams.from_proto(once.to_proto(), default_seed=0) == once


def test_logit_bias_is_in_order_of_ids():
    """A map has none: both workers must add alike, and equal requests must be equal."""
    message = common_pb2.SamplingParams(logit_bias={9: 1.0, 3: 2.0, 7: 3.0})
    assert SamplingParams.from_proto(message, default_seed=0).logit_bias == ((3, 2.0), (7, 3.0), (9, 1.0))


def test_a_least_length_above_the_greatest_is_refused_whichever_was_given():
    with pytest.raises(InvalidRequest, match="min_tokens is 9, and the answer has at most 8") as raised:
        SamplingParams(min_tokens=9, max_tokens=8).validate()
    assert raised.value.field == "min_tokens"


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SamplingParams)])
def test_what_changes_logits_is_known(name):
    """Rows whose logits are taken as they are must not pay for those that are not."""
    changing = {
        "logit_bias": ((1, 1.0),),
        "bad_tokens": ((1,),),
        "min_tokens": 1,
        "repetition_penalty": 0.5,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.5,
    }
    value = changing.get(name, 1)
    assert SamplingParams(**{name: value}).changes_logits == (name in changing)


def test_greedy_below_any_useful_temperature():
    assert SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=0.01).greedy

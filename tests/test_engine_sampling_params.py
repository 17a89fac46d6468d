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
    )
    assert all(getattr(params, f.name) != f.default for f in dataclasses.fields(SamplingParams))
    message = common_pb2.SamplingParams.FromString(params.to_proto().SerializeToString())
    assert SamplingParams.from_proto(message, default_seed=1) == params


def test_going_through_the_message_twice_changes_nothing_more():
    """Both workers must draw alike: float32 rounds 0.7 and 0.9 once."""
    once = SamplingParams.from_proto(SamplingParams(temperature=0.7, top_p=0.9).to_proto(), default_seed=0)
    assert once.temperature == pytest.approx(0.7)
    assert SamplingParams.from_proto(once.to_proto(), default_seed=0) == once


def test_greedy_below_any_useful_temperature():
    assert SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=0.01).greedy

"""The runner that stays a step ahead gives the same tokens as the one that computes each step at once."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import device_runner, prefill_graph
from engine.device_runner import DeviceRunner
from engine.loader import load_model
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Finish
from engine_rig import Hopes, Request, make_engine, random_work, run
from kernels.attention import AttentionPlan, DecodePlan, PrefillPlan
from kernels.decode_attention import decode_attention
from kernels.prefill_attention import prefill_attention
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_tiny_model(tmp_path_factory.mktemp("model")), "float32", "cpu").model


class CalledGraphs:
    """Stands in for CUDA graphs: what would be recorded is called at each replay."""

    def record(self, call):
        return call


def attend(plan, q, cache, layer, window=0, soft_cap=0.0):
    """As `DecodePlan.attend`, by the CPU's kernel: zeros in the rows that nobody sits in."""
    seated = plan.context_lens.nonzero()[:, 0]
    if not len(seated):
        return torch.zeros_like(q)
    starts = torch.arange(len(seated) + 1, dtype=torch.int32)
    rows = AttentionPlan(plan.page_table[seated], starts, plan.context_lens[seated], len(seated), cache.shape[4])
    out = decode_attention(q[seated], cache, layer, rows, window=window, soft_cap=soft_cap)
    return torch.zeros_like(q).index_copy_(0, seated, out)


def note_chunks(plan, queries, contexts, heads, kv_heads, head_dim):
    """As `PrefillPlan.tiles`: the chunks' lengths, where the tiles made of them would be."""
    records = np.zeros(plan.records.shape, dtype=np.int32)
    records[0, : len(queries), :2] = list(zip(queries, contexts, strict=True))
    return records, np.array([len(queries), 0, 0, 0], dtype=np.int32)


def attend_chunks(plan, q, cache, layer):
    """As `PrefillPlan.attend`, by the CPU's kernel: NaN where there is no chunk."""
    queries, contexts = plan.records[0, : plan.counts[0], :2].T
    out = torch.full_like(q, float("nan"))
    if len(queries):
        starts = torch.nn.functional.pad(queries.cumsum(0), (1, 0)).int()
        table = plan.page_table[: len(queries)]
        chunks = AttentionPlan(table, starts, contexts.contiguous(), 0, cache.shape[4])
        out[: starts[-1]] = prefill_attention(q[: starts[-1]], cache, layer, chunks)
    return out


@pytest.fixture(params=["called", "graphs"])
def device_engine(request, monkeypatch, model):
    """Makes engines whose decode step runs on chosen rows, or as a graph's would: on all rows up to a graph's size."""
    if request.param == "graphs":
        monkeypatch.setattr(device_runner, "GraphPool", CalledGraphs)
        monkeypatch.setattr(device_runner, "has_hopper_decode", lambda q, cache: True)
        monkeypatch.setattr(device_runner, "has_hopper_prefill", lambda q, cache: True)
        monkeypatch.setattr(DecodePlan, "attend", attend)
        monkeypatch.setattr(PrefillPlan, "attend", attend_chunks)
        monkeypatch.setattr(PrefillPlan, "tiles", note_chunks)
        monkeypatch.setattr(prefill_graph, "multiprocessors", lambda device: 4)
    return lambda **settings: make_engine(model, DeviceRunner, **settings)


@pytest.mark.parametrize("seed", range(3))
def test_same_tokens_whoever_joins_and_leaves(model, device_engine, seed):
    work = random_work(seed, count=16)
    expected, how = run(make_engine(model, ModelRunner), work)
    answers, finishes = run(device_engine(), work)
    assert answers == expected
    assert finishes == how
    assert set(how.values()) == {Finish.STOP, Finish.LENGTH}


def every_setting(work):
    """The requests, each with some of all that sampling can do."""
    rng = random.Random(4)
    requests = []
    for seed, request in enumerate(work):
        answer = [rng.randrange(3, 300) for _ in range(60)]
        settings = {
            "temperature": rng.choice([0.0, 0.7, 1.5]),
            "top_k": rng.choice([0, 0, 20]),
            "top_p": rng.choice([1.0, 0.9]),
            "min_p": rng.choice([0.0, 0.02]),
            "repetition_penalty": rng.choice([1.0, 1.3]),
            "frequency_penalty": rng.choice([0.0, 0.4]),
            "presence_penalty": rng.choice([0.0, -0.3]),
            "logit_bias": rng.choice([(), ((5, 4.0), (6, -50.0))]),
            "bad_tokens": rng.choice([(), ((answer[0],), (answer[1],))]),
            "min_tokens": rng.choice([0, min(4, request.answer_len)]),
            "logprobs": rng.choice([None, 0, 3]),
            "prompt_logprobs": rng.choice([None, None, 2]),
        }
        requests.append(replace(request, sampling=SamplingParams(seed=seed, **settings)))
    return requests


def assert_same_logprobs(one, other):
    for name in ("logprobs", "prompt_logprobs"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert [(p.token_id, list(p.top_ids)) for p in ours] == [(p.token_id, list(p.top_ids)) for p in theirs]
        for p, q in zip(ours, theirs, strict=True):
            assert [p.logprob, *p.top_logprobs] == pytest.approx([q.logprob, *q.top_logprobs], abs=1e-4)


def test_whatever_sampling_is_asked_for(model, device_engine):
    work = every_setting(random_work(seed=2, count=24))
    plain, ahead = make_engine(model, ModelRunner), device_engine()
    expected, how = run(plain, work, keep=(kept_plain := {}))
    answers, finishes = run(ahead, work, keep=(kept_ahead := {}))
    assert answers == expected
    assert finishes == how
    for name, one in kept_ahead.items():
        assert_same_logprobs(one, kept_plain[name])
    assert any(one.logprobs for one in kept_ahead.values())
    assert any(one.prompt_logprobs for one in kept_ahead.values())


def test_who_gives_up_its_pages_goes_on_as_if_it_had_not(model, device_engine):
    """Rows leave and join with a token unread; what they were counted for is counted anew."""
    work = every_setting(random_work(seed=7, count=16, steps=3, longest=20))
    expected, how = run(make_engine(model, ModelRunner), work, keep=(kept_plain := {}))
    engine = device_engine(num_pages=16, lengths=Hopes())
    answers, finishes = run(engine, work, keep=(kept := {}))
    assert engine.scheduler.preemptions > 5
    assert answers == expected
    assert finishes == how
    for name, one in kept.items():
        assert_same_logprobs(one, kept_plain[name])


def test_runs_of_tokens_are_banned_one_step_behind(model, device_engine):
    """What the free answer says is banned pair by pair, so every step depends on the token before it."""
    free, _ = run(make_engine(model, ModelRunner), [Request(0, "a", (7, 8, 9), 12)])
    pairs = tuple(zip(free["a"], free["a"][1:], strict=False))
    work = [
        Request(0, "a", (7, 8, 9), 12, sampling=SamplingParams(bad_tokens=pairs)),
        Request(2, "b", (70, 80, 90), 12),
    ]
    expected, _ = run(make_engine(model, ModelRunner), work)
    assert expected["a"] != free["a"]
    assert run(device_engine(), work)[0] == expected
    few = device_engine(num_pages=6, lengths=Hopes())
    assert run(few, work)[0] == expected
    assert few.scheduler.preemptions


def test_who_is_dropped_disturbs_nobody(model, device_engine):
    work = random_work(seed=9, count=12, steps=12)
    drops = {step: [str(step % 12)] for step in range(2, 30, 3)}
    expected, _ = run(make_engine(model, ModelRunner), work)
    answers, finishes = run(device_engine(), work, drops)
    assert len(finishes) < len(expected)
    for name, tokens in answers.items():
        assert tokens == expected[name][: len(tokens)]
        assert name not in finishes or tokens == expected[name]


def test_rows_move_down_into_a_smaller_graph(model, device_engine):
    """Ten sequences of which the first nine end early: the last one goes on in row 0."""
    work = [Request(0, str(n), (n + 3, 50, 60 + n), 3 if n < 9 else 25) for n in range(10)]
    engine = device_engine(token_budget=40)
    answers, _ = run(engine, work)
    assert engine._runner._seating.size == 1
    alone, _ = run(make_engine(model, ModelRunner), work[9:])
    assert answers["9"] == alone["9"]


def test_a_prompt_of_one_token(model, device_engine):
    work = [Request(0, "a", (7,), 5)]
    expected, _ = run(make_engine(model, ModelRunner), work)
    assert run(device_engine(), work)[0] == expected

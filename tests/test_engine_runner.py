"""Options reach the sampler, and log-probabilities are those of the model, however a prompt is cut and packed."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

import oracle
from engine.loader import load_model
from engine.sampling_params import SamplingParams
from engine_alone import make_engine, run
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(path):
    return load_model(path, "float32", "cpu").model


def prompt_of(length, seed=1):
    rng = random.Random(seed)
    return [rng.randrange(3, 250) for _ in range(length)]


def check(found, logprobs, tokens, top):
    """`found` are those of `tokens`, by the rows of logprobs [len(tokens), vocab]."""
    assert [one.token_id for one in found] == list(tokens)
    for one, row, token in zip(found, logprobs, tokens, strict=True):
        assert one.logprob == pytest.approx(row[token].item(), abs=2e-4)
        best = row.sort(descending=True)
        assert one.top_logprobs == pytest.approx(best.values[:top].tolist(), abs=2e-4)
        assert row[list(one.top_ids)].tolist() == pytest.approx(best.values[:top].tolist(), abs=2e-4)
        assert len(set(one.top_ids)) == len(one.top_ids) == top


@pytest.mark.parametrize("budget", [8, 13, 64, 512])
@pytest.mark.parametrize("top", [0, 1, 20])
def test_log_probabilities_are_the_models(model, path, budget, top):
    """Four sequences beside each other, two of which ask; in chunks of any length, decode rows between them."""
    asking = SamplingParams(max_tokens=5, temperature=1.2, seed=4, logprobs=top, prompt_logprobs=top)
    jobs = [
        (prompt_of(30), SamplingParams(max_tokens=20)),
        (prompt_of(41, 2), asking),
        (prompt_of(1, 3), asking),
        (prompt_of(25, 4), SamplingParams(max_tokens=3)),
    ]
    for one in run(make_engine(model, budget), jobs):
        logprobs = oracle.logits(path, one.tokens).log_softmax(-1)
        if one.sampling.logprobs is None:
            assert (one.logprobs, one.prompt_logprobs) == ([], [])
            continue
        prompt, answer = one.tokens[: one.prompt_len], one.tokens[one.prompt_len :]
        assert len(one.logprobs) >= 1
        check(one.prompt_logprobs, logprobs[: one.prompt_len - 1], prompt[1:], top)
        check(one.logprobs, logprobs[one.prompt_len - 1 : -1], answer, top)


def test_they_are_of_the_logits_before_anything_changes_them(model):
    plain = SamplingParams(max_tokens=1, logprobs=3)
    [first] = run(make_engine(model), [(prompt_of(9), plain)])
    other = first.logprobs[0].top_ids[1]
    params = SamplingParams(
        max_tokens=1, logprobs=3, temperature=0.3, top_k=1, logit_bias=((other, 90.0),), repetition_penalty=3.0
    )
    [changed] = run(make_engine(model), [(prompt_of(9), params)])
    assert changed.tokens[-1] == other
    assert changed.logprobs[0].logprob == pytest.approx(first.logprobs[0].top_logprobs[1])
    assert list(changed.logprobs[0].top_ids) == list(first.logprobs[0].top_ids)


def test_a_prompt_is_scored_in_full_though_its_pages_are_held(model):
    engine, prompt = make_engine(model), prompt_of(30)
    run(engine, [(prompt, SamplingParams(max_tokens=1))])
    asking = SamplingParams(max_tokens=1, prompt_logprobs=2)
    [again] = run(engine, [(prompt, SamplingParams(max_tokens=1))])
    assert again.prefix_pages == 7
    [scored] = run(engine, [(prompt, asking)])
    assert scored.prefix_pages == 0
    [alone] = run(make_engine(model), [(prompt, asking)])
    assert [one.token_id for one in scored.prompt_logprobs] == prompt[1:]
    assert [one.logprob for one in scored.prompt_logprobs] == pytest.approx(
        [one.logprob for one in alone.prompt_logprobs], abs=1e-5
    )
    assert engine.scheduler.pool.held_pages == 0


def test_asking_changes_no_token(model):
    """Nor do those that ask change their neighbours'."""
    jobs = [(prompt_of(20, seed), SamplingParams(max_tokens=12, temperature=0.9, seed=seed)) for seed in range(6)]
    asking = [(prompt, replace(params, logprobs=5, prompt_logprobs=0)) for prompt, params in jobs]
    mixed = [pair[index % 2] for index, pair in enumerate(zip(jobs, asking, strict=True))]
    plain, scored, half = ([one.tokens for one in run(make_engine(model), work)] for work in (jobs, asking, mixed))
    assert plain == scored == half


def test_an_answer_obeys_its_options(model):
    prompt = prompt_of(12)

    def answer(**settings):
        [one] = run(make_engine(model), [(prompt, SamplingParams(max_tokens=40, temperature=1.0, seed=9, **settings))])
        return one.tokens[one.prompt_len :]

    free = answer()
    pair = tuple(free[3:5])
    banned = answer(bad_tokens=((free[1],), pair))
    assert free[1] not in banned
    assert pair not in list(pairwise(banned))
    assert len(set(answer(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=3.0))) > len(set(free))
    assert set(answer(logit_bias=((50, 100.0),))) == {50}
    ends = answer(logit_bias=((2, 100.0),), min_tokens=7)
    assert len(ends) == 8
    assert ends.index(2) == 7

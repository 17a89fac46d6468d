"""Sequences that give up their pages for others, and go on later as if they had not."""

import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.answer_lengths import AnswerLengths
from engine.config import EngineConfig
from engine.engine import Done, Engine
from engine.loader import load_model
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Finish
from engine_rig import Hopes, Request, make_engine, random_work, run
from kvstore.pool import PagePool
from tiny_model import make_tiny_model

PAGE = 4


def following(tokens) -> int:
    """What `PagedRunner` samples after these tokens."""
    return 1000 + hash(tuple(tokens)) % 89


class PagedRunner:
    """Keeps tokens in the pages, and samples by what it reads there: a wrong or missing one shows in the next token."""

    def __init__(self, behind, num_pages):
        self.behind = behind
        self.fail = None
        self.cells = [[None] * PAGE for _ in range(num_pages)]
        self.newest = {}  # of each sequence, as a device has it before the host
        self.launched = []
        self.scored = {}

    def launch(self, chunks):
        if self.fail:
            raise self.fail
        self.launched.append([(c.sequence.request_id, c.start, c.end) for c in chunks])
        for chunk in chunks:
            self.compute(chunk)
        return Done([self.newest[chunk.sequence] for chunk in chunks if chunk.is_last])

    def compute(self, chunk):
        sequence, cells = chunk.sequence, self.cells
        for at in range(chunk.start, chunk.end):
            token = sequence.tokens[at] if at < len(sequence.tokens) else self.newest[sequence]
            cells[sequence.pages[at // PAGE]][at % PAGE] = token
        self.scored.setdefault(sequence.request_id, []).extend(range(chunk.start, chunk.start + chunk.scored))
        if chunk.is_last:
            context = (cells[sequence.pages[at // PAGE]][at % PAGE] for at in range(chunk.end))
            self.newest[sequence] = following(context)


def paged_engine(num_pages, lengths=None, behind=1, **config) -> Engine:
    sizes = {"page_size": PAGE, "num_pages": num_pages, "token_budget": 8, "max_sequences": 4} | config
    scheduler = Scheduler(PagePool(num_pages), EngineConfig(**sizes), lengths=lengths or Hopes())
    return Engine(scheduler, PagedRunner(behind, num_pages))


def add(engine, *requests):
    sequences = [request.sequence(PAGE) for request in requests]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    return sequences


def answer_to(request) -> tuple[list[int], Finish]:
    tokens = list(request.prompt)
    while len(tokens) < len(request.prompt) + request.answer_len:
        tokens.append(following(tokens))
        if tokens[-1] in request.end_ids:
            return tokens[len(request.prompt) :], Finish.STOP
    return tokens[len(request.prompt) :], Finish.LENGTH


def check(engine, work, drops: Mapping[int, list[str]] = {}):
    """Everyone gets the answer that it would get alone, each prompt token's log-probability is found once, and
    nothing is held afterwards.
    """
    answers, finishes = run(engine, work, drops)
    for request in work:
        tokens, finish = answer_to(request)
        if request.name not in finishes:  # dropped
            assert request.name in {name for names in drops.values() for name in names}
            assert answers[request.name] == tokens[: len(answers[request.name])]
            continue
        assert answers[request.name] == tokens
        assert finishes[request.name] is finish
        if request.sampling.prompt_logprobs is not None:
            assert engine._runner.scored[request.name] == list(range(len(request.prompt) - 1))


@st.composite
def loads(draw):
    """A pool of few pages, requests that each fit into it, some with a prefix in common, and some that are dropped."""
    num_pages = draw(st.integers(3, 14))
    work = []
    for name in range(draw(st.integers(1, 8))):
        prompt = (5,) * draw(st.sampled_from([0, 4, 9])) + tuple(
            range(100 * name, 100 * name + draw(st.integers(1, 9)))
        )
        prompt = prompt[-num_pages * PAGE :]
        longest = num_pages * PAGE + 1 - len(prompt)
        work.append(
            Request(
                at=draw(st.integers(0, 12)),
                name=str(name),
                prompt=prompt,
                answer_len=draw(st.integers(1, min(24, longest))),
                end_ids=frozenset(range(1000, 1000 + draw(st.sampled_from([0, 0, 8])))),
                sampling=SamplingParams(prompt_logprobs=draw(st.sampled_from([None, None, 0]))),
            )
        )
    drops = draw(st.dictionaries(st.integers(0, 20), st.lists(st.sampled_from("01234567"), max_size=1), max_size=2))
    return num_pages, work, drops


@settings(max_examples=100, deadline=None)
@given(
    load=loads(),
    behind=st.sampled_from([0, 1]),
    budget=st.sampled_from([4, 8, 32]),
    hope=st.sampled_from([1, 4, None]),
)
def test_any_load_on_any_pool_gets_the_answers_of_an_empty_one(load, behind, budget, hope):
    num_pages, work, drops = load
    lengths = AnswerLengths() if hope is None else Hopes(hope)
    check(paged_engine(num_pages, lengths, behind, token_budget=budget), work, drops)


LONG = [Request(0, str(n), tuple(range(100 * n, 100 * n + 6)), 20) for n in range(4)]  # 7 pages each in the end


@pytest.mark.parametrize("behind", [0, 1])
def test_pages_run_out_and_everyone_gets_to_its_end(behind):
    engine = paged_engine(10, behind=behind)
    check(engine, LONG)
    assert engine.scheduler.preemptions > 3


def test_a_pool_for_one_serves_one_after_the_other():
    engine = paged_engine(7)
    check(engine, LONG)
    assert {name for step in engine._runner.launched[-6:] for name, *_ in step} == {"3"}


def test_credit_for_the_longest_answer_never_runs_out():
    engine = paged_engine(10, Hopes(tokens=100))
    check(engine, LONG)
    assert engine.scheduler.preemptions == 0


def test_pages_come_back_one_step_after_the_last_token():
    """The second is admitted so late that the first ends, as expected, just before it needs that room."""
    engine = paged_engine(6, Hopes(tokens=100), token_budget=32)
    check(engine, [Request(7, "a", tuple(range(6)), 8), Request(12, "b", tuple(range(100, 106)), 11)])
    assert engine.scheduler.preemptions == 0


def test_log_probabilities_of_a_prompt_go_on_where_they_were():
    """b is preempted within its prompt, and what is known of it by then ends within a page."""
    engine = paged_engine(7, behind=0, token_budget=9)
    long = Request(0, "b", tuple(range(50, 70)), 3, sampling=SamplingParams(prompt_logprobs=0))
    a, b = add(engine, Request(0, "a", (1, 2, 3), 24), long)
    engine.step()
    engine.scheduler._preempt(b)
    assert b.scored % PAGE
    while not b.dropped:
        for progress in engine.step():
            if progress.finish:
                engine.scheduler.drop(progress.sequence)
    assert engine._runner.scored["b"] == list(range(19))
    assert b.tokens[20:] == answer_to(long)[0]
    engine.scheduler.drop(a)


def step_until_preempted(engine) -> None:
    for _ in range(100):
        if engine.scheduler.preemptions:
            return
        engine.step()
    raise AssertionError("nobody was preempted")


def test_who_costs_least_to_bring_back_gives_way():
    engine = paged_engine(8, token_budget=32)
    a, b, c = add(
        engine, Request(0, "a", (1, 2, 3), 20), Request(0, "b", (4, 5), 20), Request(0, "c", tuple(range(50, 59)), 20)
    )
    step_until_preempted(engine)
    assert engine.scheduler.running == [a, c]
    assert list(engine.scheduler.waiting) == [b]


def test_of_equals_the_youngest_gives_way():
    engine = paged_engine(8, token_budget=32)
    sequences = add(
        engine, *(Request(0, name, tuple(range(at, at + 6)), 20) for name, at in (("a", 0), ("b", 50), ("c", 90)))
    )
    step_until_preempted(engine)
    assert engine.scheduler.running == sequences[:2]


def test_pages_that_others_read_as_well_are_not_counted_as_lost():
    """c is longer than b, but most of it is a's prefix too."""
    engine = paged_engine(7, token_budget=32)
    prefix = tuple(range(8))
    [a] = add(engine, Request(0, "a", (*prefix, 20), 20))
    engine.step()
    engine.step()
    b, c = add(engine, Request(0, "b", (60, 61, 62, 63, 64), 20), Request(0, "c", (*prefix, 30), 20))
    step_until_preempted(engine)
    assert c not in engine.scheduler.running
    assert engine.scheduler.running == [a, b]


def test_the_oldest_never_gives_way():
    """It is the cheapest by far: its answer has just begun when the others' prompts are in."""
    engine = paged_engine(8, token_budget=32)
    a, *_ = add(engine, Request(0, "a", (1,), 24), Request(0, "b", tuple(range(30, 45)), 12))
    while not a.dropped:
        for progress in engine.step():
            if progress.finish:
                engine.scheduler.drop(progress.sequence)
        assert a not in engine.scheduler.waiting
    assert engine.scheduler.preemptions


def test_what_stays_cached_is_not_computed_again():
    engine = paged_engine(8, behind=0, token_budget=32)
    a, b = add(engine, Request(0, "a", (1, 2, 3), 30), Request(0, "b", tuple(range(50, 58)), 12))
    step_until_preempted(engine)
    assert list(engine.scheduler.waiting) == [b]
    held = len(engine.scheduler.pool.match(b.keys))
    assert held == 4
    engine.scheduler.drop(a)
    engine._runner.launched.clear()
    engine.step()
    assert engine._runner.launched == [[("b", held * PAGE, len(b.tokens) - 1)]]


def test_a_preempted_sequence_stands_before_all_that_came_later():
    engine = paged_engine(6, token_budget=32)
    _, b = add(engine, Request(0, "a", (1, 2, 3, 4, 5, 6), 15), Request(0, "b", (7, 8), 15))
    engine.step()
    [c] = add(engine, Request(0, "c", tuple(range(60, 80)), 2))
    step_until_preempted(engine)
    assert list(engine.scheduler.waiting) == [b, c]
    assert engine.scheduler.queued_tokens >= len(b.tokens) + 20


def test_a_token_under_way_counts_and_is_told_once():
    engine = paged_engine(6)
    a, b = add(engine, Request(0, "a", (1, 2, 3, 4, 5, 6), 15), Request(0, "b", (7, 8), 15))
    told = {a: [], b: []}
    while engine.scheduler.has_work:
        before = b.unread, engine.scheduler.preemptions
        for progress in engine.step():
            if progress.token is not None:
                told[progress.sequence].append(progress.token)
            if progress.finish:
                engine.scheduler.drop(progress.sequence)
        if engine.scheduler.preemptions > before[1]:
            assert before[0] == 1
            assert told[b] == b.tokens[2:] == answer_to(Request(0, "", (7, 8), len(told[b])))[0]
            assert (b.computed, b.unread, b.under_way) == (0, 0, 0)
    assert told[b] == answer_to(Request(0, "", (7, 8), 15))[0]


def test_one_that_ended_with_its_last_token_under_way_leaves_the_line():
    """b is preempted in the very step in which its end token is under way."""
    for answer_len in range(2, 15):
        engine = paged_engine(6)
        check(engine, [Request(0, "a", (1, 2, 3, 4, 5, 6), 15), Request(0, "b", (7, 8), answer_len)])


def test_what_was_promised_for_later_is_lent_before_anyone_gives_way():
    """a expects nothing, b much: a's growth takes b's credit, and what b has computed stays."""

    class Of(Hopes):
        def expected(self, answered, most, share):
            return most if most == 16 else answered + 1

    engine = paged_engine(6, Of(), token_budget=32)
    a, _ = add(engine, Request(0, "a", (1, 2, 3), 9), Request(0, "b", (7, 8), 16))
    for _ in range(7):
        engine.step()
    assert engine.scheduler.pool.available_pages == 0
    assert len(a.pages) == 3
    assert engine.scheduler.preemptions == 0
    check(paged_engine(6, Of(), token_budget=32), [Request(0, "a", (1, 2, 3), 9), Request(0, "b", (7, 8), 16)])


def test_who_comes_leaves_room_for_what_the_running_are_expected_to_need():
    """a has outgrown its credit and is expected to go on: b waits, though the pool has pages for it."""

    class Late(Hopes):
        def expected(self, answered, most, share):
            return most if answered > 4 or most < 20 else answered + 1

    engine = paged_engine(8, Late(), token_budget=32)
    add(engine, Request(0, "a", (1, 2, 3), 26))
    for _ in range(8):
        engine.step()
    [b] = add(engine, Request(0, "b", tuple(range(50, 58)), 8))
    engine.step()
    assert engine.scheduler.pool.available_pages >= 4
    assert list(engine.scheduler.waiting) == [b]


def test_the_oldest_waits_where_others_than_sequences_have_the_pages():
    engine = paged_engine(4)
    credit = engine.scheduler.pool.promise(3)
    work = [Request(0, "a", (1, 2, 3), 9)]
    [a] = add(engine, *work)
    for _ in range(6):
        told = engine.step()
    assert told == []
    assert engine.scheduler.running == [a]
    credit.close()
    while len(a.tokens) < a.max_len:
        engine.step()
    engine.scheduler.drop(a)
    assert a.tokens[3:] == answer_to(work[0])[0]


def test_after_a_launch_that_failed_a_preempted_sequence_waits_for_what_is_under_way():
    work = Request(0, "a", (1, 2, 3, 4, 5, 6), 15), Request(0, "b", (7, 8), 15)
    engine = paged_engine(6)
    add(engine, *work)
    step_until_preempted(engine)
    engine, steps = paged_engine(6), len(engine._runner.launched)
    a, b = add(engine, *work)
    for _ in range(steps - 1):
        engine.step()
    engine._runner.fail = RuntimeError("no luck")
    with pytest.raises(RuntimeError):
        engine.step()
    assert engine.scheduler.preemptions == b.under_way == 1
    assert engine.scheduler.computing == [a, b]
    engine._runner.fail = None
    engine.scheduler.drop(a)
    [told] = engine.step()  # what was launched before the failure
    assert (told.sequence, b.under_way) == (b, 0)
    while len(b.tokens) < b.max_len:
        engine.step()
    assert b.tokens[2:] == answer_to(work[1])[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_tiny_model(tmp_path_factory.mktemp("model")), "float32", "cpu").model


def drawn(work):
    """The requests: greedy, drawn, and with penalties, which depend on every token so far."""
    rng = random.Random(3)
    for seed, request in enumerate(work):
        sampling = SamplingParams(
            seed=seed,
            temperature=rng.choice([0.0, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            logprobs=2,
            prompt_logprobs=rng.choice([None, 1]),
        )
        yield Request(request.at, request.name, request.prompt, request.answer_len, request.end_ids, sampling)


def test_a_model_answers_as_on_an_empty_pool(model):
    work = list(drawn(random_work(seed=7, count=12, steps=3, longest=20)))
    expected, how = run(make_engine(model, ModelRunner, num_pages=400), work, keep=(kept_plain := {}))
    engine = make_engine(model, ModelRunner, num_pages=16, lengths=Hopes())
    answers, finishes = run(engine, work, keep=(kept := {}))
    assert engine.scheduler.preemptions > 5
    assert (answers, finishes) == (expected, how)
    for name, sequence in kept.items():
        for field in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(sequence, field), getattr(kept_plain[name], field)
            assert [p.token_id for p in ours] == [p.token_id for p in theirs]
            assert [p.logprob for p in ours] == pytest.approx([p.logprob for p in theirs], abs=1e-4)

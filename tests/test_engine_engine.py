"""A step's phases: what is launched while the last step's tokens are still unread, and what becomes of them."""

from time import monotonic

import pytest

from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.sequence import Finish, Sequence
from kvstore.keys import page_keys
from kvstore.page_state import PageState
from role_kit import PAGE, ROOT, CountingRunner, make_engine


class Log(CountingRunner):
    """Samples as `CountingRunner`; notes what was launched and what was read, in order."""

    def __init__(self, behind):
        super().__init__(behind)
        self.events = []

    def launch(self, chunks):
        self.events.append(("launch", [(c.sequence.request_id, c.start, c.count) for c in chunks]))
        step, done = len(self.events), super().launch(chunks)
        return Reading(self, step, done.ids())


class Reading:
    def __init__(self, log, step, ids):
        self.log, self.step, self.sampled = log, step, ids

    def ids(self):
        self.log.events.append(("read", self.step))
        return self.sampled


def engine_with(runner, **settings) -> Engine:
    return Engine(make_engine(**settings)[0].scheduler, runner)


def sequence(name, tokens, answer_len=4, end_ids=()) -> Sequence:
    tokens = list(tokens)
    return Sequence(
        request_id=name,
        tokens=tokens,
        prompt_len=len(tokens),
        max_len=len(tokens) + answer_len,
        sampling=SamplingParams(),
        end_ids=frozenset(end_ids),
        keys=page_keys(ROOT, tokens, PAGE),
        root=ROOT,
    )


def drain(engine):
    """Step until nothing runs, dropping what ends; the tokens and the finish of each sequence."""
    answers, finishes = {}, {}
    while engine.scheduler.has_work:
        for progress in engine.step():
            name = progress.sequence.request_id
            if progress.token is not None:
                answers.setdefault(name, []).append(progress.token)
            if progress.finish:
                finishes[name] = progress.finish
                engine.scheduler.drop(progress.sequence)
    return answers, finishes


def test_a_runner_that_computes_at_once_is_read_at_once():
    log = Log(behind=0)
    engine = engine_with(log)
    engine.scheduler.add(sequence("a", range(3), answer_len=2))
    drain(engine)
    assert log.events == [("launch", [("a", 0, 3)]), ("read", 1), ("launch", [("a", 3, 1)]), ("read", 3)]


def test_the_next_step_is_launched_before_the_last_is_read():
    log = Log(behind=1)
    engine = engine_with(log)
    engine.scheduler.add(sequence("a", range(3), answer_len=3))
    assert drain(engine) == ({"a": [1003, 1004, 1005]}, {"a": Finish.LENGTH})
    launches = [("launch", [("a", 0, 3)]), ("launch", [("a", 3, 1)]), ("launch", [("a", 4, 1)])]
    assert log.events == [launches[0], launches[1], ("read", 1), launches[2], ("read", 2), ("read", 4)]


def test_an_end_token_costs_one_row_whose_result_is_for_nobody():
    log = Log(behind=1)
    engine = engine_with(log)
    engine.scheduler.add(sequence("a", range(3), answer_len=9, end_ids={1004}))
    engine.scheduler.add(sequence("b", range(50, 52), answer_len=9))
    answers, finishes = drain(engine)
    assert answers["a"] == [1003, 1004]
    assert answers["b"] == list(range(1002, 1011))
    assert finishes == {"a": Finish.STOP, "b": Finish.LENGTH}
    rows = [chunk for kind, chunks in log.events if kind == "launch" for chunk in chunks if chunk[0] == "a"]
    assert rows == [("a", 0, 3), ("a", 3, 1), ("a", 4, 1)]
    pool = engine.scheduler.pool
    assert (pool.held_pages, pool.available_pages) == (0, pool.total_pages)


@pytest.mark.parametrize("answer_len", range(1, 10))
def test_the_extra_row_never_needs_a_page_that_was_not_promised(answer_len):
    """The end token comes last but one: its own K and V may be the first of a page."""
    engine = engine_with(CountingRunner(behind=1), num_pages=3)
    end = 1000 + 3 + max(0, answer_len - 2)
    engine.scheduler.add(sequence("a", range(3), answer_len, end_ids={end}))
    answers, _ = drain(engine)
    assert answers["a"] == list(range(1003, end + 1))
    assert engine.scheduler.pool.available_pages == 3


def test_pages_are_sealed_when_the_step_that_filled_them_was_read():
    engine = engine_with(CountingRunner(behind=1), token_budget=4)
    engine.scheduler.add(one := sequence("a", range(9)))
    states = []
    for _ in range(4):
        engine.step()
        states.append([engine.scheduler.pool.state(page) for page in one.pages])
    sealed, filling = PageState.SEALED, PageState.FILLING
    assert states == [[filling], [sealed, filling], [sealed, sealed, filling], [sealed, sealed, filling]]


def test_chunks_of_a_prompt_follow_each_other_without_being_read():
    log = Log(behind=1)
    engine = engine_with(log, token_budget=4)
    engine.scheduler.add(sequence("a", range(10), answer_len=1))
    answers, _ = drain(engine)
    assert answers == {"a": [1010]}
    launched = [chunks[0][1:] for kind, chunks in log.events if kind == "launch"]
    assert launched == [(0, 4), (4, 4), (8, 2)]


def test_what_was_dropped_under_way_is_not_published():
    engine = engine_with(CountingRunner(behind=1))
    engine.scheduler.add(one := sequence("a", range(3)))
    engine.step()
    engine.scheduler.drop(one)
    assert engine.step() == []
    assert engine.scheduler.pool.available_pages == engine.scheduler.pool.total_pages


def test_after_a_launch_that_failed_the_engine_goes_on():
    runner = CountingRunner(behind=1)
    engine = engine_with(runner)
    engine.scheduler.add(one := sequence("a", range(3)))
    engine.step()
    runner.fail = RuntimeError("no luck")
    with pytest.raises(RuntimeError):
        engine.step()
    engine.scheduler.drop(one)
    runner.fail = None
    engine.scheduler.add(sequence("b", range(60, 64), answer_len=2))
    assert drain(engine) == ({"b": [1004, 1005]}, {"b": Finish.LENGTH})


def test_progress_says_when_its_step_was_launched():
    engine = engine_with(CountingRunner(behind=1), token_budget=4)
    engine.scheduler.add(sequence("a", range(9)))
    before = monotonic()
    assert engine.step() == []
    launched = monotonic()
    (first,) = engine.step()
    assert before <= first.launched <= launched


def test_each_step_is_timed_from_the_end_of_the_one_before():
    engine = engine_with(CountingRunner(behind=1))
    engine.scheduler.add(sequence("a", range(3)))
    began = monotonic()
    noted = []
    engine.times.note = lambda chunks, seconds: noted.append(seconds)
    drain(engine)
    assert len(noted) == 4
    assert 0 < sum(noted) <= monotonic() - began

"""Prompts with pages in common that arrive together: each page is computed once."""

import pytest

from engine.config import EngineConfig
from engine.engine import Done, Engine
from engine.loader import load_model
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine_rig import Request, make_engine, run
from kvstore.pool import PagePool
from tiny_model import make_tiny_model

PAGE = 4
SHARED = tuple(range(500, 512))  # three pages


class Noting:
    """Samples 7, and notes what it was asked to compute."""

    behind = 0

    def __init__(self):
        self.launched = []

    def launch(self, chunks):
        self.launched.append([(c.sequence.request_id, c.start, c.end) for c in chunks])
        return Done([7 for chunk in chunks if chunk.is_last])


@pytest.fixture
def engine() -> Engine:
    config = EngineConfig(page_size=PAGE, num_pages=32, token_budget=8, max_sequences=4)
    return Engine(Scheduler(PagePool(32), config), Noting())


def add(engine, name, *tail, answer_len=4, sampling=None, shared=SHARED):
    request = Request(0, name, shared + tail, answer_len, sampling=sampling or SamplingParams())
    sequence = request.sequence(PAGE)
    engine.scheduler.add(sequence)
    return sequence


def waiting(engine):
    return [sequence.request_id for sequence in engine.scheduler.waiting]


def assert_over(engine, *sequences):
    for sequence in sequences:
        engine.scheduler.drop(sequence)
    pool = engine.scheduler.pool
    assert (pool.held_pages, pool.available_pages) == (0, pool.total_pages)
    assert not engine.scheduler._filling._by


def test_the_second_waits_for_the_pages_that_both_have_and_computes_the_rest(engine):
    first, second = add(engine, "a", 1, 2), add(engine, "b", 3, 4)
    engine.step()
    assert engine._runner.launched == [[("a", 0, 8)]]
    assert waiting(engine) == ["b"]
    engine.step()  # seals the third page
    engine.step()
    assert engine._runner.launched[1:] == [[("a", 8, 14)], [("a", 14, 15), ("b", 12, 14)]]
    assert second.prefix_pages == 3
    assert first.pages[:3] == second.pages[:3]
    assert_over(engine, first, second)


def test_others_pass_the_one_that_waits_and_it_keeps_its_place(engine):
    first, second = add(engine, "a"), add(engine, "b", 1)
    third, fourth = add(engine, "c", shared=(9,)), add(engine, "d", 2)
    engine.step()
    assert [s.request_id for s in engine.scheduler.running] == ["a", "c"]
    engine.step()
    engine.step()
    assert [s.request_id for s in engine.scheduler.running] == ["a", "c", "b", "d"]
    assert_over(engine, first, second, third, fourth)


def test_where_the_first_ends_half_way_the_second_computes_the_rest_itself(engine):
    first, second, third = (add(engine, name, 1) for name in "abc")
    engine.step()
    engine.scheduler.drop(first)
    engine.step()
    assert engine._runner.launched[1] == [("b", 8, 13)]
    assert waiting(engine) == ["c"]  # which waits for the second now
    engine.step()
    assert third.prefix_pages == 3
    assert_over(engine, second, third)


def test_one_that_was_preempted_fills_nothing(engine):
    first, second = add(engine, "a"), add(engine, "b", 1)
    engine.step()
    engine.scheduler._preempt(first)
    engine.step()
    assert [s.request_id for s in engine.scheduler.running] == ["a"]  # again, as the older, and it fills once more
    assert waiting(engine) == ["b"]
    assert_over(engine, first, second)


def test_one_that_waits_can_be_dropped(engine):
    first, second = add(engine, "a"), add(engine, "b")
    engine.step()
    engine.scheduler.drop(second)
    assert waiting(engine) == []
    assert_over(engine, first)


def test_prompts_whose_log_probabilities_are_wanted_are_computed_in_full_and_wait_for_nobody(engine):
    first = add(engine, "a")
    second = add(engine, "b", sampling=SamplingParams(prompt_logprobs=0))
    engine.step()
    engine.step()
    assert next(chunk for step in engine._runner.launched for chunk in step if chunk[0] == "b")[1] == 0
    assert_over(engine, first, second)


def test_nothing_to_do_but_wait_is_idle(engine):
    assert engine.idle
    credit = engine.scheduler.pool.promise(32)
    sequence = add(engine, "a")
    engine.step()
    assert engine.idle  # without room only a message changes anything
    credit.close()
    engine.step()
    assert not engine.idle
    assert_over(engine, sequence)


def test_answers_are_those_of_each_alone(tmp_path):
    """Eight prompts at once on a real model; the shared pages are computed once."""
    model = load_model(make_tiny_model(tmp_path), "float32", "cpu").model
    shared = tuple(range(10, 34))
    work = [Request(0, str(n), shared + tuple(range(40 + n, 45 + 2 * n)), 6) for n in range(8)]
    engine = make_engine(model, ModelRunner)
    kept = {}
    together, _ = run(engine, work, keep=kept)
    assert [kept[str(n)].prefix_pages for n in range(8)] == [0] + [6] * 7
    for request in work:
        alone, _ = run(make_engine(model, ModelRunner), [request])
        assert together[request.name] == alone[request.name]

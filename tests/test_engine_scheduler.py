"""Which tokens are computed in a step, and what becomes of their pages."""

import pytest

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Finish, Sequence
from kvstore.keys import PageKey, page_keys
from kvstore.lineage import Lineage
from kvstore.page_state import PageState
from kvstore.pool import PagePool
from protos.errors import InvalidRequest, Overloaded

ROOT = PageKey(bytes(16))
PAGE = 4


def make(num_pages=16, **config) -> Scheduler:
    settings = {"page_size": PAGE, "num_pages": num_pages, "token_budget": 10, "max_sequences": 4, "max_waiting": 4}
    return Scheduler(PagePool(num_pages), EngineConfig(**(settings | config)))


def sequence(name: str, tokens, answer_len=1) -> Sequence:
    tokens = list(tokens)
    return Sequence(
        request_id=name,
        tokens=tokens,
        prompt_len=len(tokens),
        max_len=len(tokens) + answer_len,
        sampling=SamplingParams(),
        end_ids=frozenset({99}),
        keys=page_keys(ROOT, tokens, PAGE),
        root=ROOT,
    )


def step(scheduler: Scheduler, token=7) -> list[tuple[str, int]]:
    """Run one step as an engine would; returns (request, count) of its chunks."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        last = chunk.is_last
        scheduler.advance(chunk.sequence, chunk.count)
        if last:
            chunk.sequence.append(token)
    return [(chunk.sequence.request_id, chunk.count) for chunk in chunks]


def test_prompts_are_cut_to_the_budget_in_order_of_arrival():
    scheduler = make()
    scheduler.add(sequence("a", range(14), answer_len=5))
    scheduler.add(sequence("b", range(100, 103), answer_len=5))
    assert step(scheduler) == [("a", 10)]
    assert step(scheduler) == [("a", 4), ("b", 3)]
    assert step(scheduler) == [("a", 1), ("b", 1)]


def test_a_prompts_tail_has_a_step_of_its_own_where_that_delays_nobody():
    """So the pages before it are sealed, and can leave, while it is computed."""
    scheduler = make(num_pages=64, token_budget=32)
    scheduler.tail_tokens = 8
    scheduler.add(sequence("a", range(23), answer_len=5))
    assert step(scheduler) == [("a", 12)]  # whole pages, and 8 tokens are left at least
    assert scheduler.running[0].sealed == 3
    assert step(scheduler) == [("a", 11)]
    scheduler.add(sequence("short", range(100, 115), answer_len=5))  # no two tails
    assert step(scheduler) == [("a", 1), ("short", 15)]


def test_a_page_that_is_larger_than_the_tail_is_not_cut():
    scheduler = make(page_size=16, num_pages=64, token_budget=32)
    scheduler.tail_tokens = 4
    scheduler.add(sequence("a", range(10)))
    assert step(scheduler) == [("a", 10)]


def test_a_prompt_that_others_wait_behind_has_no_tail():
    scheduler = make(num_pages=64, token_budget=32)
    scheduler.tail_tokens = 8
    for name, first, count in (("a", 100, 20), ("b", 200, 20)):
        scheduler.add(sequence(name, range(first, first + count), answer_len=5))
    assert step(scheduler) == [("a", 20), ("b", 12)]
    scheduler.add(sequence("c", range(300, 320), answer_len=5))
    assert step(scheduler) == [("a", 1), ("b", 8), ("c", 12)]
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 8)]


def test_decode_rows_come_before_prompt_chunks():
    scheduler = make()
    scheduler.add(sequence("a", range(3), answer_len=5))
    step(scheduler)
    scheduler.add(sequence("b", range(100, 120), answer_len=1))
    assert step(scheduler) == [("a", 1), ("b", 9)]


def test_full_pages_are_sealed_as_chunks_finish_and_the_tail_is_not():
    scheduler = make()
    scheduler.add(one := sequence("a", range(14)))
    step(scheduler)
    assert [scheduler.pool.state(p) for p in one.pages] == [PageState.SEALED] * 2 + [PageState.FILLING]
    step(scheduler)
    assert [scheduler.pool.state(p) for p in one.pages] == [PageState.SEALED] * 3 + [PageState.FILLING]
    scheduler.seal_tail(one)
    assert scheduler.pool.state(one.pages[3]) is PageState.SEALED


def test_a_prefix_is_reused_but_at_least_one_token_is_computed():
    scheduler = make()
    first = sequence("a", range(8))
    scheduler.add(first)
    step(scheduler)
    pages = list(first.pages)
    scheduler.drop(first)
    scheduler.add(again := sequence("b", range(8)))
    assert step(scheduler) == [("b", 4)]
    assert again.prefix_pages == 1
    assert again.pages[0] == pages[0]
    scheduler.drop(again)
    assert scheduler.pool.held_pages == 0


def test_pages_of_sampled_tokens_are_sealed_under_keys_that_chain_on():
    sealed = []
    scheduler = make()
    scheduler._on_seal = sealed.append
    scheduler.add(one := sequence("a", range(6), answer_len=7))
    for _ in range(6):
        step(scheduler)
    keys = page_keys(ROOT, one.tokens, PAGE)
    assert sealed == [Lineage(keys[0], keys[0], None), Lineage(keys[1], keys[0], keys[0])]


def test_the_tail_page_of_a_dropped_sequence_is_never_reused():
    scheduler = make()
    scheduler.add(one := sequence("a", range(6)))
    step(scheduler)
    scheduler.seal_tail(one)
    tail, generation = one.pages[1], scheduler.pool.generation(one.pages[1])
    scheduler.drop(one)
    assert scheduler.pool.state(tail) is PageState.FREE
    assert scheduler.pool.generation(tail) == generation + 1


def test_who_has_no_room_waits_and_is_admitted_in_order():
    scheduler = make(num_pages=4)
    for name, start in (("a", 0), ("b", 100), ("c", 200)):
        scheduler.add(sequence(name, range(start, start + 9)))
    step(scheduler)
    assert [s.request_id for s in scheduler.waiting] == ["b", "c"]
    scheduler.drop(scheduler.running[0])
    step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["b"]


def test_a_sequence_never_runs_out_of_pages_once_admitted():
    scheduler = make(num_pages=4)
    scheduler.add(one := sequence("a", range(5), answer_len=12))
    while len(one.tokens) < one.max_len:
        step(scheduler)
    assert len(one.pages) == 4
    assert one.credit.remaining == 0


def test_what_can_never_fit_is_refused_at_once():
    with pytest.raises(InvalidRequest, match="the pool has 4"):
        make(num_pages=4).add(sequence("a", range(17)))


def test_the_queue_is_bounded():
    scheduler = make(max_waiting=1)
    scheduler.add(sequence("a", range(4)))
    with pytest.raises(Overloaded) as error:
        scheduler.add(sequence("b", range(4)))
    assert error.value.request_id == "b"


def test_dropping_in_any_phase_gives_everything_back():
    scheduler = make(num_pages=8)
    for phases in range(4):
        scheduler.add(one := sequence("a", range(14), answer_len=4))
        for _ in range(phases):
            step(scheduler)
        scheduler.drop(one)
        assert scheduler.pool.held_pages == 0
        assert scheduler.pool.available_pages == 8
        assert not scheduler.has_work


def test_queued_tokens_counts_what_is_still_to_be_computed():
    scheduler = make()
    scheduler.add(sequence("a", range(14)))
    scheduler.add(sequence("b", range(100, 103)))
    assert scheduler.queued_tokens == 17
    step(scheduler)
    assert scheduler.queued_tokens == 7


def test_a_sequence_ends_at_an_end_id_or_at_its_length():
    one = sequence("a", range(3), answer_len=2)
    assert one.append(5) is None
    assert one.append(99) is Finish.STOP
    two = sequence("b", range(3), answer_len=1)
    assert two.append(5) is Finish.LENGTH


def test_the_budget_must_hold_every_row():
    with pytest.raises(ValueError, match="token_budget"):
        EngineConfig(token_budget=4, max_sequences=5)


def test_sizes_that_are_not_given_suit_the_device():
    def sizes(device, **given):
        config = EngineConfig(**given).sized_for(device)
        return config.token_budget, config.max_sequences

    assert (sizes("cpu"), sizes("cuda")) == ((512, 64), (2048, 256))
    assert sizes("cuda", token_budget=100) == (100, 100)
    assert sizes("cuda", max_sequences=4000) == (4000, 4000)
    assert sizes("cuda", token_budget=8192, max_sequences=128) == (8192, 128)

"""The placement formula: each term by itself, and the choices that follow."""

from dataclasses import replace

import pytest

from fake_worker import FORMAT
from kvstore.directory import WorkerRecord
from router.placement import (
    FETCH_START_MS,
    HIDDEN_SHARE,
    SHORTLIST,
    STEP_BASE_SEQUENCES,
    TYPICAL_ANSWER,
    Candidate,
    Holder,
    Job,
    best_source,
    choose,
    likely_sources,
    predict,
    predict_colocated,
)

NOW = 100.0
JOB = Job(prompt_tokens=1000, max_tokens=50, page_size=64, page_bytes=1_000_000)
IDLE = Candidate(
    worker_id="a",
    incarnation=1,
    host="10.0.0.1",
    transports=("shm", "tcp"),
    max_tokens=8192,
    prefix_pages=0,
    queued_tokens=0,
    newer_tokens=0,
    tokens_per_s=1000.0,
    running=0,
    waiting=0,
    step_ms=10.0,
    available_pages=1000,
    held_pages=0,
    measured_at=NOW,
    pull_rates={},
)


def cost(prefill=IDLE, decode=IDLE, job=JOB, now=NOW):
    return predict(prefill, decode, job, now)


def holder(pages, host="10.0.0.1", worker_id="store", transports=("shm", "tcp")) -> Holder:
    endpoints = tuple((name, "somewhere") for name in transports)
    return Holder(WorkerRecord(worker_id, 1, "store", f"{host}:99", "m", "w", FORMAT, 0, endpoints), pages)


def fetched(source, worker=IDLE, job=JOB):
    return predict(worker, IDLE, job, NOW, source)


def test_the_total_is_the_sum_of_its_terms():
    both = predict(replace(IDLE, queued_tokens=3), IDLE, JOB, NOW, holder(10))
    assert both.ttft_ms == both.queue_ms + both.fetch_ms + both.compute_ms
    assert both.total_ms == both.ttft_ms + both.hand_over_ms + both.decode_ms
    for term in (both.queue_ms, both.fetch_ms, both.compute_ms, both.hand_over_ms, both.decode_ms, both.total_ms):
        assert f"{term:.1f}" in str(both)


def test_queue_is_what_waits_at_the_measured_rate():
    assert cost(replace(IDLE, queued_tokens=500)).queue_ms == 500.0
    assert cost(replace(IDLE, queued_tokens=500, tokens_per_s=2000.0)).queue_ms == 250.0


def test_a_measured_queue_has_moved_on_since():
    assert cost(replace(IDLE, queued_tokens=500), now=NOW + 0.2).queue_ms == pytest.approx(300.0)
    assert cost(replace(IDLE, queued_tokens=500), now=NOW + 9).queue_ms == 0.0


def test_what_was_asked_since_has_not():
    assert cost(replace(IDLE, queued_tokens=500, newer_tokens=100), now=NOW + 9).queue_ms == 100.0


def test_compute_leaves_out_the_held_prefix():
    assert cost().compute_ms == 1000.0
    assert cost(replace(IDLE, prefix_pages=10)).compute_ms == 1000.0 - 640.0


def test_the_last_token_is_always_computed():
    whole_pages = replace(JOB, prompt_tokens=128)
    assert cost(replace(IDLE, prefix_pages=2), job=whole_pages).compute_ms == 64.0
    assert cost(replace(IDLE, prefix_pages=2), job=replace(JOB, prompt_tokens=129)).compute_ms == 1.0


def test_a_worker_without_a_measured_rate_is_neither_free_nor_forbidden():
    fresh = cost(replace(IDLE, tokens_per_s=0.0, step_ms=0.0))
    assert 0 < fresh.compute_ms < 1e6
    assert 0 < fresh.decode_ms < 1e6


def test_hand_over_beside_prefill_costs_its_last_page_and_a_share_of_the_others():
    assert cost().hand_over_ms == pytest.approx(0.25 + 15 * 0.25 * HIDDEN_SHARE)  # pages of 1 MB at 4 GB/s
    assert cost(decode=replace(IDLE, prefix_pages=15)).hand_over_ms == pytest.approx(0.25)


def test_hand_over_counts_in_full_where_there_is_nothing_to_hide_behind():
    fast = replace(IDLE, tokens_per_s=1e9)
    assert cost(fast).hand_over_ms == pytest.approx(16 * 0.25, rel=1e-3)


def test_pages_that_decode_holds_are_not_moved():
    fast = replace(IDLE, tokens_per_s=1e9)
    assert cost(fast, replace(IDLE, prefix_pages=15)).hand_over_ms == pytest.approx(0.25, rel=1e-3)
    whole = replace(JOB, prompt_tokens=128)
    assert cost(fast, replace(IDLE, prefix_pages=2), whole).hand_over_ms == 0.0


def test_shared_memory_reaches_only_within_a_host():
    away = replace(IDLE, host="10.0.0.2")
    assert cost(decode=away).hand_over_ms == pytest.approx(4 * cost().hand_over_ms)  # tcp: 1 GB/s against 4


def test_decode_pays_for_the_batch_that_it_joins():
    alone = cost().decode_ms
    assert alone == pytest.approx(50 * 10.0 * (STEP_BASE_SEQUENCES + 1) / STEP_BASE_SEQUENCES)
    assert cost(decode=replace(IDLE, waiting=8)).decode_ms > alone


def test_a_long_answer_counts_as_a_typical_one():
    assert cost(job=replace(JOB, max_tokens=8000)).decode_ms < 11 * TYPICAL_ANSWER + 1e6
    unbounded = replace(IDLE, available_pages=10**6)
    assert cost(decode=unbounded, job=replace(JOB, max_tokens=8000)).decode_ms == pytest.approx(
        TYPICAL_ANSWER * 10.0 * (STEP_BASE_SEQUENCES + 1) / STEP_BASE_SEQUENCES
    )


def test_decode_without_room_costs_the_wait_for_it():
    full = replace(IDLE, available_pages=0, held_pages=170)
    assert cost(decode=full).decode_ms - cost().decode_ms == pytest.approx(TYPICAL_ANSWER * 10.0 * 17 / 170)


def test_pages_of_a_job():
    assert (JOB.prompt_pages, JOB.likely_pages) == (16, 17)
    assert replace(JOB, prompt_tokens=64, max_tokens=1).likely_pages == 1  # the last token is written nowhere
    assert replace(JOB, prompt_tokens=64, max_tokens=2).likely_pages == 2
    assert replace(JOB, max_tokens=8000).likely_pages == replace(JOB, max_tokens=TYPICAL_ANSWER).likely_pages


def named(name, **changes):
    return replace(IDLE, worker_id=name, **changes)


def chosen(prefills, decodes, job=JOB):
    placement = choose(prefills, decodes, job, NOW)
    return placement and (placement.prefill.worker_id, placement.decode.worker_id)


def test_the_holder_of_the_prefix_is_chosen_until_its_queue_is_longer_than_the_prefix():
    holder, other = named("holder", prefix_pages=10), named("other")
    assert chosen([other, holder], [IDLE]) == ("holder", "a")
    assert chosen([other, replace(holder, queued_tokens=700)], [IDLE]) == ("other", "a")


def test_decode_with_the_smaller_batch_is_chosen():
    assert chosen([IDLE], [named("busy", running=8, waiting=4), named("idle", running=8)]) == ("a", "idle")


def test_of_equal_decode_workers_the_holder_of_the_prefix_is_chosen():
    assert chosen([IDLE], [named("other"), named("holder", prefix_pages=10)]) == ("a", "holder")


def test_a_pair_on_one_host_is_preferred():
    here, there = named("here", tokens_per_s=1e6), named("there", host="10.0.0.2")
    assert chosen([here], [there, named("beside")]) == ("here", "beside")


def test_equal_pairs_are_chosen_alike():
    workers = [named("a"), named("b")]
    assert {chosen(workers, workers) for _ in range(5)} == {("a", "a")}


def test_workers_that_are_too_small_are_passed_over():
    small, large = named("small", max_tokens=1020), named("large", max_tokens=1050)
    assert chosen([small], [small, large]) == ("small", "large")  # prefill needs one token behind the prompt
    assert chosen([named("tiny", max_tokens=1000)], [large]) is None
    assert chosen([large], [small]) is None
    assert chosen([], [large]) is None


def test_a_large_fleet_is_placed_among_its_best():
    prefills = [named(f"p{i}", queued_tokens=1000 - i) for i in range(200)]
    decodes = [named(f"d{i}", waiting=200 - i) for i in range(200)]
    assert chosen(prefills, decodes) == ("p199", "d199")


def test_a_colocated_worker_is_weighed_by_the_same_terms_without_a_hand_over():
    busy = replace(IDLE, queued_tokens=300, running=8)
    alone, pair = predict_colocated(busy, JOB, NOW), cost(busy, busy)
    assert alone == replace(pair, hand_over_ms=0.0)
    assert pair.hand_over_ms > 0


def test_the_cheaper_of_pair_and_colocated_worker_is_chosen():
    idle, busy = named("idle"), named("busy", queued_tokens=900)
    small = named("small", max_tokens=1049)  # one token too few
    for colocated, expected in ((idle, ("idle", "idle")), (busy, ("a", "a")), (small, ("a", "a"))):
        placement = choose([IDLE], [IDLE], JOB, NOW, [colocated])
        assert (placement.prefill.worker_id, placement.decode.worker_id) == expected
    assert choose([], [IDLE], JOB, NOW, [busy]).prefill == busy
    assert choose([], [], JOB, NOW, [small]) is None


def test_a_fetch_costs_its_start_and_the_pages_that_are_lacking():
    both = fetched(holder(10))
    assert both.fetch_ms == pytest.approx(FETCH_START_MS + 10 * 0.25)  # pages of 1 MB at 4 GB/s
    assert both.compute_ms == 1000.0 - 640.0
    assert fetched(holder(10), replace(IDLE, prefix_pages=6)).fetch_ms == pytest.approx(FETCH_START_MS + 4 * 0.25)
    assert cost().fetch_ms == 0.0


def test_a_fetch_never_brings_the_page_of_the_last_token():
    whole_pages = replace(JOB, prompt_tokens=128)
    both = fetched(holder(2), job=whole_pages)
    assert both.fetch_ms == pytest.approx(FETCH_START_MS + 0.25)
    assert both.compute_ms == 64.0


def test_shared_memory_and_gpus_memory_reach_only_within_a_host():
    for transports, far in ((("shm", "tcp"), 1.0), (("cuda_ipc", "tcp"), 1.0), (("cuda_ipc",), 1.0)):
        there = fetched(holder(10, host="10.0.0.2", transports=transports)).fetch_ms
        assert there == pytest.approx(FETCH_START_MS + 10 * far)  # 1 MB at 1 GB/s
        assert fetched(holder(10, transports=transports)).fetch_ms < there
    assert fetched(holder(10, transports=("cuda_ipc", "tcp"))).fetch_ms < fetched(holder(10)).fetch_ms


def test_the_rate_that_a_worker_has_measured_counts():
    measured = replace(IDLE, pull_rates={"shm": 8e9})
    assert fetched(holder(10), measured).fetch_ms == pytest.approx(FETCH_START_MS + 10 * 0.125)
    by_tcp = fetched(holder(10, host="10.0.0.2"), measured)
    assert by_tcp.fetch_ms == pytest.approx(FETCH_START_MS + 10 * 1.0), "nothing was measured of tcp"
    assert cost(IDLE, replace(IDLE, pull_rates={"shm": 1e5})).hand_over_ms > cost().hand_over_ms
    assert cost(measured, IDLE).hand_over_ms == cost().hand_over_ms, "the reader's rate counts"
    slow = replace(IDLE, pull_rates={"shm": 1e7})  # 100 ms for each page, 64 to compute it
    assert source_of(IDLE, holder(10)) == holder(10)
    assert source_of(slow, holder(10)) is None


def test_a_fetch_beside_a_queue_costs_a_share_of_its_time():
    whole = FETCH_START_MS + 10 * 0.25
    assert fetched(holder(10), replace(IDLE, queued_tokens=500)).fetch_ms == pytest.approx(whole * HIDDEN_SHARE)
    assert fetched(holder(10), replace(IDLE, queued_tokens=5)).fetch_ms == pytest.approx(whole - 5 + 5 * HIDDEN_SHARE)


def source_of(worker, *holders, job=JOB):
    return best_source(worker, job, NOW, likely_sources(holders))


def test_a_source_is_taken_only_where_moving_is_faster_than_computing():
    near = holder(10)
    assert source_of(IDLE, near) == near
    assert source_of(replace(IDLE, tokens_per_s=1e6), near) is None  # 640 tokens in 0.64 ms
    large = replace(JOB, page_bytes=400_000_000)
    assert source_of(IDLE, near, job=large) is None  # 100 ms for each page, 64 to compute it
    assert source_of(replace(IDLE, prefix_pages=10), near) is None


def test_of_several_sources_the_fastest_is_taken():
    near, far, farther = holder(9), holder(10, host="10.0.0.2"), holder(10, host="10.0.0.3", worker_id="z")
    assert source_of(IDLE, near, far, farther) == far  # a page more saves 64 ms, and tcp costs 10
    assert source_of(IDLE, near, holder(9, host="10.0.0.2")) == near
    slow = replace(JOB, page_bytes=100_000_000)  # by tcp 100 ms each, by shm 25
    assert source_of(IDLE, near, far, job=slow) == near
    assert source_of(IDLE, holder(8, worker_id="less"), near) == near


def test_the_source_on_the_own_host_is_looked_at_among_many():
    near = holder(9)
    far = [holder(10, host=f"10.0.1.{i}") for i in range(4 * SHORTLIST)]
    assert source_of(IDLE, *far, near, job=replace(JOB, page_bytes=100_000_000)) == near


def test_who_can_fetch_competes_with_who_holds():
    """The holder of the prefix is busy; its neighbour fetches, and is chosen with its source."""
    busy = named("busy", prefix_pages=10, queued_tokens=500)
    source = holder(10, worker_id="busy")
    placement = choose([busy, named("idle")], [IDLE], JOB, NOW, [], [source])
    assert (placement.prefill.worker_id, placement.source) == ("idle", source)
    assert placement.cost.fetch_ms > 0
    free = replace(busy, queued_tokens=0)
    placement = choose([free, named("idle")], [IDLE], JOB, NOW, [], [source])
    assert (placement.prefill.worker_id, placement.source, placement.cost.fetch_ms) == ("busy", None, 0.0)
    placement = choose([], [], JOB, NOW, [named("alone")], [source])
    assert (placement.prefill.worker_id, placement.source) == ("alone", source)

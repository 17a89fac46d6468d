"""The prefill pool's side of the protocol, message by message."""

import time

import pytest

from prefill_worker.role import PrefillRole
from protos.errors import DiptychError
from protos.v1 import common_pb2
from role_kit import PAGE, ScriptedPuller, assert_empty, cancel, make_engine, release, request, updates
from worker.role import is_idle


@pytest.fixture
def role() -> PrefillRole:
    return PrefillRole(make_engine()[0], ScriptedPuller())


def run(role, steps=1):
    for _ in range(steps):
        role.step()
    return updates(role)


def test_pages_are_named_as_chunks_are_sealed_and_the_first_token_comes_with_the_tail(role):
    role.handle("r", request("prefill", "a", range(10)))
    first, second = run(role)[0], run(role)[0]
    assert [ref.index for ref in first.sealed] == [0, 1]
    assert not first.token_ids
    assert [ref.index for ref in second.sealed] == [2]
    assert list(second.token_ids) == [1010]
    assert second.HasField("prefill")
    for ref in (*first.sealed, *second.sealed):
        assert ref.generation == role.pool.generation(ref.page)


def test_log_probabilities_are_told_as_they_are_found(role):
    """Those of the prompt chunk by chunk, in updates of bounded size; that of the first token with it."""
    role.handle("r", request("prefill", "a", range(10)))
    [sequence] = role.engine.scheduler.waiting
    sequence.prompt_logprobs += [common_pb2.TokenLogprobs(token_id=token) for token in range(5000)]
    first, second, pages = run(role)
    assert [one.token_id for one in (*first.prompt_logprobs, *second.prompt_logprobs)] == list(range(5000))
    assert len(first.prompt_logprobs) == 4096
    assert [ref.index for ref in pages.sealed] == [0, 1]
    sequence.prompt_logprobs.append(common_pb2.TokenLogprobs(token_id=7))
    sequence.logprobs.append(common_pb2.TokenLogprobs(token_id=1010))
    last, token = run(role)
    assert [one.token_id for one in last.prompt_logprobs] == [7]
    assert [one.token_id for one in token.logprobs] == list(token.token_ids) == [1010]
    role.handle("r", release("a"))
    assert_empty(role)


def test_pages_stay_pinned_until_release(role):
    role.handle("r", request("prefill", "a", range(10)))
    run(role, 2)
    assert role.pool.held_pages == 3
    assert not is_idle(role.load())
    role.handle("r", release("a"))
    role.handle("r", release("a"))  # a repeated message means nothing
    assert_empty(role)


def test_a_reused_prefix_is_named_at_once_and_counted(role):
    role.handle("r", request("prefill", "a", range(10)))
    run(role, 2)
    role.handle("r", release("a"))
    role.handle("r", request("prefill", "b", range(10)))
    update = run(role)[0]
    assert [ref.index for ref in update.sealed] == [0, 1, 2]
    assert update.prefill.prefix_pages == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 1}, common_pb2.FINISH_REASON_LENGTH),
        ({"end_ids": [1010]}, common_pb2.FINISH_REASON_STOP),
    ],
)
def test_a_first_token_that_is_the_whole_answer_needs_no_hand_over(role, options, reason):
    role.handle("r", request("prefill", "a", range(10), **options))
    update = run(role, 2)[-1]
    assert update.finish_reason == reason
    assert not update.sealed
    assert_empty(role)


@pytest.mark.parametrize("steps", [0, 1, 2], ids=["queued", "half way", "pinned"])
def test_cancel_frees_in_every_phase(role, steps):
    role.handle("r", request("prefill", "a", range(10)))
    run(role, steps)
    role.handle("r", cancel("a"))
    assert_empty(role)
    assert run(role) == []


@pytest.mark.parametrize("steps", [0, 1, 2], ids=["queued", "half way", "pinned"])
def test_a_lost_router_frees_in_every_phase_and_disturbs_no_other(role, steps):
    role.handle("other", request("prefill", "b", range(100, 104)))
    role.handle("r", request("prefill", "a", range(10)))
    run(role, steps)
    role.drop_router("r")
    for _ in range(3):
        role.step()
    role.handle("other", release("b"))
    assert_empty(role)


@pytest.mark.parametrize("steps", [0, 1, 2], ids=["queued", "half way", "pinned"])
def test_a_deadline_frees_in_every_phase(role, steps):
    role.handle("r", request("prefill", "a", range(10), deadline_s=5.0))
    run(role, steps)
    role.expire(time.monotonic() + 4.0)
    assert not is_idle(role.load())
    role.expire(time.monotonic() + 6.0)
    assert_empty(role)
    told = [update.error.code for update in updates(role)]
    assert told == (["deadline_exceeded"] if steps < 2 else [])  # a pin's end is no error: the request went on


def test_what_does_not_fit_is_refused_by_name(role):
    role.handle("r", request("prefill", "a", range(17 * PAGE)))
    error = updates(role)[0].error
    assert (error.code, error.request_id) == ("invalid_request", "a")
    assert_empty(role)


def test_keys_that_do_not_fit_the_tokens_are_refused(role):
    role.handle("r", request("prefill", "a", range(10), page_keys=bytes(16)))
    assert updates(role)[0].error.code == "invalid_request"
    role.handle("r", request("prefill", "b", range(10), token_ids=b"\x01\x02\x03"))
    assert updates(role)[0].error.code == "invalid_request"
    assert_empty(role)


def test_an_id_that_runs_already_is_refused_and_the_first_goes_on(role):
    role.handle("r", request("prefill", "a", range(10)))
    role.handle("r", request("prefill", "a", range(10)))
    assert updates(role)[0].error.field == "request_id"
    assert list(run(role, 2)[-1].token_ids) == [1010]
    role.handle("r", release("a"))
    assert_empty(role)


def test_a_full_queue_refuses_and_says_so(role):
    for name in "abcde":
        role.handle("r", request("prefill", name, range(10)))
    assert [(u.request_id, u.error.code) for u in updates(role)] == [("e", "overloaded")]


def test_a_failed_step_ends_its_requests_with_an_error_and_nothing_else():
    engine, runner = make_engine()
    role = PrefillRole(engine, ScriptedPuller())
    role.handle("r", request("prefill", "a", range(4)))
    runner.fail = RuntimeError("no such luck")
    with pytest.raises(RuntimeError):
        role.step()
    role.fail_running(DiptychError("the engine failed"))
    error = updates(role)[0].error
    assert (error.request_id, error.stage) == ("a", "prefill")
    assert_empty(role)
    runner.fail = None
    role.handle("r", request("prefill", "b", range(4)))
    assert list(run(role)[0].token_ids) == [1004]


def test_load_tells_what_placement_needs(role):
    role.handle("r", request("prefill", "a", range(10)))
    load = role.load()
    assert (load.waiting, load.queued_tokens, load.total_pages, load.available_pages) == (1, 10, 16, 16)
    run(role)
    load = role.load()
    assert (load.running, load.queued_tokens, load.held_pages, load.available_pages) == (1, 2, 2, 13)
    assert load.tokens_per_s > 0

"""The colocated pool's side of the protocol, message by message."""

import time

import pytest

from colocated_worker.role import ColocatedRole
from engine_rig import Hopes
from protos.errors import DiptychError
from protos.v1 import common_pb2
from role_kit import PAGE, ScriptedPuller, assert_empty, cancel, make_engine, request, updates
from worker.role import is_idle


@pytest.fixture(params=[0, 1], ids=["computed at once", "read one step behind"])
def role(request) -> ColocatedRole:
    engine, runner = make_engine()
    runner.behind = request.param
    return ColocatedRole(engine, ScriptedPuller())


def until_told(role, count: int) -> list:
    """Step until at least so many updates were told."""
    told: list = []
    for _ in range(100):
        if len(told) >= count:
            return told
        role.step()
        told += updates(role)
    raise AssertionError(f"only {told}")


def test_a_prompt_goes_on_to_its_last_token(role):
    """Two chunks, then one token a step; nothing is named, nothing is held afterwards."""
    role.handle("r", request("prefill", "a", range(10), max_tokens=5))
    told = until_told(role, 5)
    assert [list(update.token_ids) for update in told] == [[1010], [1011], [1012], [1013], [1014]]
    assert [update.HasField("prefill") for update in told] == [True, False, False, False, False]
    assert [update.finish_reason for update in told] == [0, 0, 0, 0, common_pb2.FINISH_REASON_LENGTH]
    assert not any(update.sealed for update in told)
    assert_empty(role)


def test_prompts_and_decode_rows_share_a_step(role):
    """A long prompt that arrives does not stop who decodes."""
    role.handle("r", request("prefill", "a", range(4), max_tokens=12))
    until_told(role, 1)
    role.handle("r", request("prefill", "b", range(100, 120), max_tokens=2))  # three chunks of 7, beside a row each
    told = until_told(role, 5)
    assert [update.request_id for update in told].index("b") >= 2
    assert [update.token_ids[0] for update in told if update.request_id == "a"][:2] == [1005, 1006]


@pytest.mark.parametrize(
    ("options", "tokens", "reason"),
    [
        ({"max_tokens": 1}, [1010], common_pb2.FINISH_REASON_LENGTH),
        ({"end_ids": [1010]}, [1010], common_pb2.FINISH_REASON_STOP),
        ({"end_ids": [1012]}, [1010, 1011, 1012], common_pb2.FINISH_REASON_STOP),
    ],
)
def test_it_ends_where_it_should(role, options, tokens, reason):
    role.handle("r", request("prefill", "a", range(10), **options))
    told = until_told(role, len(tokens))
    assert [token for update in told for token in update.token_ids] == tokens
    assert told[-1].finish_reason == reason
    assert_empty(role)


def test_pages_of_prompt_and_answer_are_kept_and_used_again(role):
    role.handle("r", request("prefill", "a", range(10), max_tokens=8))
    tokens = [update.token_ids[0] for update in until_told(role, 8)]
    role.handle("r", request("prefill", "b", [*range(10), *tokens], max_tokens=2))
    told = until_told(role, 2)
    assert told[0].prefill.prefix_pages == 4  # of 18 tokens: the last one was never computed
    assert_empty(role)


def test_log_probabilities_are_told_with_their_tokens(role):
    """Those of the prompt before the first token, in updates of bounded size; each token's own with it, once."""
    role.handle("r", request("prefill", "a", range(4), max_tokens=3))
    [sequence] = role.engine.scheduler.waiting
    sequence.prompt_logprobs += [common_pb2.TokenLogprobs(token_id=token) for token in range(5000)]
    sequence.logprobs.append(common_pb2.TokenLogprobs(token_id=1004))
    first, second, token = until_told(role, 3)
    assert [one.token_id for one in (*first.prompt_logprobs, *second.prompt_logprobs)] == list(range(5000))
    assert [one.token_id for one in token.logprobs] == list(token.token_ids) == [1004]
    sequence.logprobs.append(common_pb2.TokenLogprobs(token_id=1005))
    [token] = until_told(role, 1)
    assert [one.token_id for one in token.logprobs] == list(token.token_ids) == [1005]
    role.handle("r", cancel("a"))
    assert_empty(role)


PHASES = pytest.mark.parametrize("steps", [0, 1, 4], ids=["queued", "half way", "decoding"])


@PHASES
def test_cancel_frees_in_every_phase(role, steps):
    role.handle("r", request("prefill", "a", range(10)))
    for _ in range(steps):
        role.step()
    role.handle("r", cancel("a"))
    role.handle("r", cancel("a"))  # a repeated message means nothing
    updates(role)
    assert_empty(role)
    role.step()
    assert updates(role) == []


@PHASES
def test_a_lost_router_frees_in_every_phase_and_disturbs_no_other(role, steps):
    role.handle("other", request("prefill", "b", range(100, 104), max_tokens=9))
    role.handle("r", request("prefill", "a", range(10)))
    for _ in range(steps):
        role.step()
    role.drop_router("r")
    for _ in range(12):
        role.step()
    assert [update.token_ids[0] for update in updates(role, "other")] == list(range(1004, 1013))
    assert_empty(role)


@pytest.mark.parametrize(("steps", "stage"), [(0, "prefill"), (1, "prefill"), (4, "decode")])
def test_a_deadline_frees_in_every_phase_and_names_it(role, steps, stage):
    role.handle("r", request("prefill", "a", range(10), deadline_s=5.0))
    for _ in range(steps):
        role.step()
    role.expire(time.monotonic() + 4.0)
    assert not is_idle(role.load())
    role.expire(time.monotonic() + 6.0)
    assert_empty(role)
    error = updates(role)[-1].error
    assert (error.code, error.stage, error.request_id) == ("deadline_exceeded", stage, "a")


def test_room_for_the_expected_answer_is_kept_from_the_start(role):
    role.handle("r", request("prefill", "a", range(10), max_tokens=30))  # 39 tokens: 10 of 16 pages
    role.handle("r", request("prefill", "b", range(100, 110), max_tokens=30))
    role.step()
    load = role.load()
    assert (load.running, load.waiting, load.available_pages) == (1, 1, 6)
    told = until_told(role, 60)
    assert {name: sum(update.request_id == name for update in told) for name in "ab"} == {"a": 30, "b": 30}
    assert role.load().preemptions == 0
    assert_empty(role)


def test_who_gives_up_its_pages_tells_each_token_once():
    role = ColocatedRole(make_engine(num_pages=6, lengths=Hopes())[0], ScriptedPuller())
    role.handle("r", request("prefill", "a", range(10), max_tokens=15))
    role.handle("r", request("prefill", "b", range(100, 104), max_tokens=15))
    told = until_told(role, 30)
    assert role.load().preemptions
    for name, prompt_len in (("a", 10), ("b", 4)):
        mine = [update for update in told if update.request_id == name]
        assert [update.token_ids[0] for update in mine] == list(range(1000 + prompt_len, 1015 + prompt_len))
        assert [update.HasField("prefill") for update in mine] == [True] + [False] * 14
    assert_empty(role)


def test_what_does_not_fit_or_runs_already_is_refused(role):
    role.handle("r", request("prefill", "a", range(10), max_tokens=16 * PAGE))
    assert updates(role)[0].error.code == "invalid_request"
    role.handle("r", request("prefill", "b", range(4), max_tokens=2))
    role.handle("r", request("prefill", "b", range(4), max_tokens=2))
    assert updates(role)[0].error.field == "request_id"
    until_told(role, 2)
    assert_empty(role)


def test_a_failed_step_ends_its_requests_with_an_error_that_names_their_phase():
    engine, runner = make_engine()
    role = ColocatedRole(engine, ScriptedPuller())
    role.handle("r", request("prefill", "a", range(4)))
    until_told(role, 1)
    role.handle("r", request("prefill", "b", range(4)))
    runner.fail = RuntimeError("no such luck")
    with pytest.raises(RuntimeError):
        role.step()
    role.fail_running(DiptychError("the engine failed"))
    assert {(u.error.request_id, u.error.stage) for u in updates(role)} == {("a", "decode"), ("b", "prefill")}
    assert_empty(role)


def test_load_tells_both_rates(role):
    """Neither is diluted by steps of the other kind."""
    role.handle("r", request("prefill", "a", range(10), max_tokens=8))
    assert (role.load().waiting, role.load().queued_tokens) == (1, 10)
    role.step()
    role.step()
    rate = role.load().tokens_per_s
    assert rate > 0
    until_told(role, 6)
    assert role.load().step_ms > 0
    if role.engine._runner.behind == 0:
        assert role.load().tokens_per_s == rate

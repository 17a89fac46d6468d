"""The decode pool's side of the protocol, message by message; pulls come back when the test says so."""

import time

import pytest

from decode_worker.role import DecodeRole
from engine_rig import Hopes
from kvstore.keys import page_keys
from protos.errors import DiptychError, StalePage
from protos.v1 import common_pb2, worker_pb2
from role_kit import ROOT, ScriptedPuller, assert_empty, cancel, make_engine, request, updates


@pytest.fixture
def puller() -> ScriptedPuller:
    return ScriptedPuller()


@pytest.fixture
def role(puller) -> DecodeRole:
    return DecodeRole(make_engine()[0], puller)


def pages(request_id, *indexes):
    refs = [worker_pb2.PageRef(index=index, page=50 + index, generation=3) for index in indexes]
    return worker_pb2.RouterMessage(pages=worker_pb2.Pages(request_id=request_id, pages=refs))


def start(request_id, token=7):
    return worker_pb2.RouterMessage(start=worker_pb2.Start(request_id=request_id, first_token=token))


def join(role, puller, name="a", tokens=range(10), **options):
    """Bring a request as far as the batch."""
    role.handle("r", request("decode", name, tokens, **options))
    role.handle("r", pages(name, 0, 1, 2))
    puller.finish()
    role.handle("r", start(name))


def test_a_sequence_joins_when_every_page_is_verified_and_the_first_token_is_known(role, puller):
    role.handle("r", request("decode", "a", range(10), max_tokens=4))
    role.handle("r", pages("a", 0, 1))
    role.handle("r", pages("a", 2))
    role.handle("r", start("a"))
    puller.finish()
    assert updates(role) == []
    role.step()
    assert updates(role) == []  # one pull is still out: no token may be computed
    puller.finish()
    report = updates(role)[0].hand_over
    assert (report.pages, report.bytes, report.pull_ms, report.transport) == (3, 300, 3.0, "shm")
    role.step()
    assert list(updates(role)[0].token_ids) == [1011]


def test_pages_may_be_there_before_the_first_token(role, puller):
    role.handle("r", request("decode", "a", range(10)))
    role.handle("r", pages("a", 0, 1, 2))
    puller.finish()
    assert not role.engine.scheduler.running
    role.handle("r", start("a"))
    assert role.engine.scheduler.running


def test_it_ends_at_its_length_and_frees_everything(role, puller):
    join(role, puller, max_tokens=4)
    for _ in range(3):
        role.step()
    told = updates(role)
    assert [token for update in told for token in update.token_ids] == [1011, 1012, 1013]
    assert told[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert_empty(role)


def test_each_token_has_its_own_log_probability(role, puller):
    join(role, puller, max_tokens=4)
    updates(role)
    [sequence] = role.engine.scheduler.running
    for token in (1011, 1012):
        sequence.logprobs.append(common_pb2.TokenLogprobs(token_id=token))
        role.step()
    told = updates(role)
    assert [[one.token_id for one in update.logprobs] for update in told] == [[1011], [1012]]
    role.step()
    assert not updates(role)[0].logprobs
    assert_empty(role)


def test_it_ends_at_an_end_id(role, puller):
    join(role, puller, end_ids=[1012])
    role.step()
    role.step()
    assert updates(role)[-1].finish_reason == common_pb2.FINISH_REASON_STOP
    assert_empty(role)


def test_full_pages_are_kept_and_not_pulled_again(role, puller):
    join(role, puller, max_tokens=4)
    for _ in range(3):
        role.step()
    updates(role)
    role.handle("r", request("decode", "b", range(10), max_tokens=4))
    role.handle("r", pages("b", 0, 1, 2))
    assert [ref.index for ref in puller.pulls[0][0]] == [2]  # the tail alone
    puller.finish()
    role.handle("r", start("b"))
    assert updates(role)[0].hand_over.prefix_pages == 2


def test_pages_of_answers_are_kept_under_their_keys(role, puller):
    join(role, puller, max_tokens=4)
    for _ in range(3):
        role.step()
    tokens = [*range(10), 7, 1011, 1012]
    assert len(role.pool.match(page_keys(ROOT, tokens, 4))) == 3


def test_room_for_the_expected_answer_is_kept_from_the_start(role, puller):
    role.handle("r", request("decode", "a", range(10), max_tokens=30))  # 39 tokens: 10 of 16 pages
    role.handle("r", request("decode", "b", range(100, 110), max_tokens=30))
    assert role.load().available_pages == 6
    assert role.load().waiting == 1
    role.handle("r", pages("b", 0, 1, 2))
    assert not puller.pulls  # named, but there is no room yet
    role.handle("r", cancel("a"))
    assert [ref.index for ref in puller.pulls[0][0]] == [0, 1, 2]


@pytest.fixture
def crowded(puller) -> DecodeRole:
    """Two sequences, the second of which has just given up its pages for the first; a third waits."""
    role = DecodeRole(make_engine(num_pages=7, lengths=Hopes())[0], puller)
    join(role, puller, "a", max_tokens=16)
    join(role, puller, "b", range(100, 110), max_tokens=16)
    role.handle("r", request("decode", "c", range(200, 210)))
    updates(role)
    while not role.load().preemptions:
        role.step()
    assert [sequence.request_id for sequence in role.engine.scheduler.waiting] == ["b"]
    return role


def test_a_preempted_sequence_goes_on_where_it_was_and_before_those_who_wait(crowded, puller):
    """What it lost is computed here; nothing is pulled again, and nothing told twice."""
    told = updates(crowded)
    assert crowded.load().waiting == 2
    assert not puller.pulls
    while crowded.engine.scheduler.waiting:
        assert not crowded._requests["c"].admitted
        crowded.step()
    for _ in range(30):
        crowded.step()
    assert list(crowded._requests) == ["b", "c"]
    assert crowded._requests["c"].admitted  # b waits for the pages that are kept for what c pulls
    crowded.handle("r", cancel("c"))
    for _ in range(30):
        crowded.step()
    told += updates(crowded)
    for name in "ab":
        tokens = [token for update in told if update.request_id == name for token in update.token_ids]
        assert tokens == list(range(1011, 1026))
    assert_empty(crowded)


@pytest.mark.parametrize("end", ["cancel", "router", "deadline"])
def test_a_preempted_sequence_can_be_ended(crowded, end):
    if end == "cancel":
        for name in "abc":
            crowded.handle("r", cancel(name))
    elif end == "router":
        crowded.drop_router("r")
    else:
        crowded.expire(time.monotonic() + 61)
        assert {u.error.code for u in updates(crowded) if u.HasField("error")} == {"deadline_exceeded"}
    assert_empty(crowded)


def test_a_stale_page_is_a_typed_error_and_never_a_token(role, puller):
    role.handle("r", request("decode", "a", range(10)))
    role.handle("r", pages("a", 0, 1, 2))
    role.handle("r", start("a"))
    puller.finish(StalePage("page 51 has generation 4, not 3", stage="hand_over"))
    role.step()
    told = updates(role)
    assert [(u.error.code, u.error.stage, list(u.token_ids)) for u in told] == [("stale_page", "hand_over", [])]
    assert_empty(role)
    assert role.pool.match(page_keys(ROOT, range(10), 4)) == []


@pytest.mark.parametrize("end", ["cancel", "router", "deadline"])
def test_pages_are_not_free_while_a_pull_still_writes_into_them(role, puller, end):
    role.handle("r", request("decode", "a", range(10), deadline_s=5.0))
    role.handle("r", pages("a", 0, 1, 2))
    into = puller.pulls[0][1]
    generations = [role.pool.generation(page) for page in into]
    if end == "cancel":
        role.handle("r", cancel("a"))
    elif end == "router":
        role.drop_router("r")
    else:
        role.expire(time.monotonic() + 6.0)
        assert updates(role)[0].error.code == "deadline_exceeded"
    assert [role.pool.writers(page) for page in into] == [1, 1, 1]
    assert [role.pool.generation(page) for page in into] == generations
    puller.finish()
    assert_empty(role)
    assert [role.pool.generation(page) for page in into] == [g + 1 for g in generations]


def test_cancel_while_waiting_and_while_running(role, puller):
    join(role, puller, max_tokens=40)
    role.handle("r", request("decode", "b", range(100, 110), max_tokens=40))
    role.handle("r", cancel("b"))
    role.step()
    role.handle("r", cancel("a"))
    role.handle("r", cancel("a"))
    assert_empty(role)


def test_no_more_sequences_than_the_batch_holds():
    puller = ScriptedPuller()
    role = DecodeRole(make_engine(num_pages=64)[0], puller)
    for index in range(6):
        role.handle("r", request("decode", str(index), range(index * 100, index * 100 + 10)))
    assert role.load().waiting == 2
    role.handle("r", cancel("0"))
    assert role.load().waiting == 1


def test_one_that_waited_for_room_and_then_finds_all_its_pages_joins(puller):
    """Its prompt fills its pages exactly, so nothing is left to be pulled when it gets room."""
    role = DecodeRole(make_engine(max_sequences=1)[0], puller)
    for name in ("a", "b"):
        role.handle("r", request("decode", name, range(8), max_tokens=2))
        role.handle("r", pages(name, 0, 1))
        role.handle("r", start(name))
    puller.finish()
    role.step()  # the last of a
    role.step()
    assert [update.request_id for update in updates(role) if update.token_ids] == ["a", "b"]
    assert not puller.pulls
    assert_empty(role)


def test_pages_named_out_of_order_end_the_request(role, puller):
    role.handle("r", request("decode", "a", range(10)))
    role.handle("r", pages("a", 1))
    assert updates(role)[0].error.field == "pages"
    assert_empty(role)


def test_more_pages_than_the_prompt_has_end_the_request(role, puller):
    role.handle("r", request("decode", "a", range(10)))
    role.handle("r", pages("a", 0, 1, 2, 3))
    assert updates(role)[0].error.field == "pages"
    assert_empty(role)


@pytest.mark.parametrize("late", [start("a"), pages("a", 3)], ids=["start", "pages"])
def test_what_comes_after_the_hand_over_ends_the_request(role, puller, late):
    """A second start would count the prompt twice; a page that is pulled then would overwrite the answer's."""
    join(role, puller)
    updates(role)
    role.handle("r", late)
    assert updates(role)[0].error.code == "invalid_request"
    assert_empty(role)


def test_one_that_ends_by_the_room_that_another_leaves_disturbs_nobody(role):
    """Both deadlines pass at once; the second's pages were named wrongly, which shows when it gets room."""
    role.handle("r", request("decode", "a", range(50), max_tokens=8))
    role.handle("r", request("decode", "b", range(50), max_tokens=8))
    role.handle("r", pages("b", 1))
    role.expire(time.monotonic() + 100)
    assert [update.error.code for update in updates(role)] == ["invalid_request", "deadline_exceeded"]
    assert_empty(role)


def test_what_can_never_fit_and_what_runs_already_is_refused(role):
    role.handle("r", request("decode", "a", range(10), max_tokens=60))
    assert updates(role)[0].error.code == "invalid_request"
    role.handle("r", request("decode", "b", range(10)))
    role.handle("r", request("decode", "b", range(10)))
    assert updates(role)[0].error.field == "request_id"


def test_a_failed_step_ends_its_requests(puller):
    engine, runner = make_engine()
    role = DecodeRole(engine, puller)
    join(role, puller)
    updates(role)
    runner.fail = RuntimeError("no such luck")
    with pytest.raises(RuntimeError):
        role.step()
    role.fail_running(DiptychError("the engine failed"))
    assert updates(role)[0].error.stage == "decode"
    assert_empty(role)


def test_late_messages_for_a_request_that_ended_mean_nothing(role, puller):
    for message in (pages("gone", 0), start("gone"), cancel("gone")):
        role.handle("r", message)
    assert updates(role) == []
    assert_empty(role)

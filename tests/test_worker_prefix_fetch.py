"""Prompts whose first pages come from elsewhere: what arrives is used, the rest is computed, and nothing is lost."""

import time

import pytest

from colocated_worker.role import ColocatedRole
from kvstore.keys import page_keys
from kvstore.page_state import PageState
from prefill_worker.role import PrefillRole
from protos.errors import DeadlineExceeded, StalePage, WorkerLost
from protos.v1 import worker_pb2
from role_kit import PAGE, ROOT, ScriptedPuller, assert_empty, cancel, make_engine, release, request, updates

PROMPT = range(22)  # five full pages and a part of a sixth
KEYS = page_keys(ROOT, list(PROMPT), PAGE)


@pytest.fixture
def puller() -> ScriptedPuller:
    return ScriptedPuller()


@pytest.fixture
def role(puller) -> PrefillRole:
    return PrefillRole(make_engine()[0], puller)


def ask(name="a", tokens=PROMPT, pages=5, **options):
    """A Prefill whose first pages are said to be elsewhere."""
    source = worker_pb2.PageSource(worker_id="store-0", incarnation=9)
    fetch = worker_pb2.Fetch(source=source, address="there:1", pages=pages)
    return request("prefill", name, tokens, fetch=fetch, **options)


def begin(role, puller, **options):
    """The fetch that a request has set going."""
    role.handle("r", ask(**options))
    role.step()
    return puller.fetches[-1]


def finish(role, name="a"):
    """Step to the first token, let go, and return what the router was told of the prompt."""
    for _ in range(9):
        role.step()
        for update in updates(role):
            if update.request_id == name and update.token_ids:
                role.handle("r", release(name))
                return update.prefill
    raise AssertionError("no token")


def computed(role) -> int:
    """Tokens that the only sequence has still to compute."""
    return role.engine.scheduler.queued_tokens


def test_what_is_fetched_is_not_computed(role, puller):
    fetch = begin(role, puller)
    assert (fetch.keys, fetch.order.address) == (KEYS, "there:1")
    assert updates(role) == []  # no step without the pages
    assert role.load().waiting == 1
    assert computed(role) == 2
    fetch.arrive(5)
    assert [ref.index for ref in updates(role)[0].sealed] == [0, 1, 2, 3, 4]  # decode can pull them now
    assert role.pool.match(KEYS) == fetch.into
    fetch.end()
    role.step()
    [update] = updates(role)
    assert (list(update.token_ids), [ref.index for ref in update.sealed]) == ([1022], [5])
    assert (update.prefill.prefix_pages, update.prefill.fetched_pages) == (0, 5)
    assert update.prefill.queue_ms >= update.prefill.fetch_ms > 0
    role.handle("r", release("a"))
    assert_empty(role)


def test_pages_are_used_batch_by_batch_and_the_sequence_waits_for_the_last(role, puller):
    fetch = begin(role, puller)
    fetch.arrive(2)
    role.step()
    assert [[ref.index for ref in update.sealed] for update in updates(role)] == [[0, 1]]
    fetch.arrive(3)
    fetch.end()
    assert [[ref.index for ref in update.sealed] for update in updates(role)] == [[2, 3, 4]]
    assert finish(role).fetched_pages == 5
    assert_empty(role)


@pytest.mark.parametrize("arrived", [0, 2])
@pytest.mark.parametrize(
    "error",
    [None, StalePage("freed"), WorkerLost("gone"), DeadlineExceeded("no answer")],
    ids=["short run", "stale", "lost", "silent"],
)
def test_where_not_all_arrives_the_leading_run_is_used_and_the_rest_computed(role, puller, arrived, error):
    fetch = begin(role, puller)
    if arrived:
        fetch.arrive(arrived)
    fetch.end(error)
    assert computed(role) == 22 - arrived * PAGE
    assert role.pool.match(KEYS) == fetch.into[:arrived]
    for page in fetch.into[arrived:]:
        assert role.pool.state(page) is PageState.FREE
    [sequence] = role.engine.scheduler.running
    assert (len(sequence.pages), sequence.credit.remaining) == (arrived, 6 - arrived)
    report = finish(role)
    assert (report.fetched_pages, report.prefix_pages) == (arrived, 0)
    assert len(role.pool.match(KEYS)) == 5
    assert_empty(role)


def test_only_what_is_lacking_is_asked_for(role, puller):
    role.handle("r", request("prefill", "a", range(11)))  # two full pages of the same prompt
    finish(role)
    fetch = begin(role, puller, name="b")
    assert fetch.keys == KEYS[2:]
    fetch.arrive(3)
    fetch.end()
    report = finish(role, "b")
    assert (report.prefix_pages, report.fetched_pages) == (2, 3)
    role.handle("r", ask("c", pages=2))
    role.step()
    assert len(puller.fetches) == 1  # nothing is lacking of what is there
    finish(role, "c")
    assert_empty(role)


def test_the_page_of_the_last_token_is_not_fetched(role, puller):
    assert begin(role, puller, tokens=range(20)).keys == KEYS[:4]
    puller.fetches[0].end()
    finish(role)


def test_log_probabilities_of_the_prompt_need_every_position(role, puller):
    message = ask()
    message.prefill.sampling.prompt_logprobs = 0
    role.handle("r", message)
    finish(role)
    assert puller.fetches == []
    assert_empty(role)


ENDS = pytest.mark.parametrize("end", ["cancel", "router", "deadline"])


@ENDS
@pytest.mark.parametrize("arrived", [0, 2])
def test_pages_are_not_free_while_a_pull_may_write_into_them(role, puller, end, arrived):
    fetch = begin(role, puller, deadline_s=60.0)
    if arrived:
        fetch.arrive(arrived)
    pending = fetch.into[arrived:]
    generations = [role.pool.generation(page) for page in pending]
    if end == "cancel":
        role.handle("r", cancel("a"))
    elif end == "router":
        role.drop_router("r")
    else:
        role.expire(time.monotonic() + 61.0)
        error = updates(role)[-1].error
        assert (error.code, error.stage) == ("deadline_exceeded", "prefill")
    assert not fetch.by.wanted  # the puller need not go on
    assert [role.pool.writers(page) for page in pending] == [1] * len(pending)
    assert role.pool.held_pages == len(pending)
    fetch.by.arrived(1)  # a batch that was on its way
    assert [role.pool.generation(page) for page in pending] == generations
    fetch.end(WorkerLost("too late"))
    assert_empty(role)
    assert [role.pool.generation(page) for page in pending] == [g + 1 for g in generations]
    role.step()
    assert all(update.HasField("error") or update.sealed for update in updates(role))


def test_past_its_time_the_prompt_is_computed_while_the_pull_still_writes(role, puller):
    fetch = begin(role, puller)
    fetch.arrive(1)
    role.expire(time.monotonic() + fetch.timeout_s / 2)
    assert fetch.by.wanted
    role.expire(time.monotonic() + fetch.timeout_s)
    assert computed(role) == 22 - PAGE
    report = finish(role)
    assert (report.fetched_pages, report.prefix_pages) == (1, 0)
    assert role.pool.held_pages == 4  # those of the pull
    assert not set(fetch.into[1:]) & set(role.pool.match(KEYS))
    fetch.end(WorkerLost("at last"))
    assert_empty(role)


def test_without_room_for_other_pages_it_waits_on_for_the_pull(puller):
    role = PrefillRole(make_engine(num_pages=8)[0], puller)
    fetch = begin(role, puller)
    role.expire(time.monotonic() + fetch.timeout_s)
    assert fetch.by.wanted  # two pages are left, and five are needed
    role.step()
    fetch.end(WorkerLost("at last"))
    assert finish(role).fetched_pages == 0
    assert_empty(role)


def test_the_time_is_what_computing_would_take(role, puller):
    assert begin(role, puller).timeout_s == 2.0  # no rate is known yet
    puller.fetches[0].end()
    finish(role)
    for rate, seconds in ((10.0, 5 * PAGE / 10.0), (1e6, 0.25), (0.1, 10.0)):
        role.engine.times.tokens_per_s = rate
        fetch = begin(role, puller, tokens=range(100, 122))
        assert fetch.timeout_s == seconds
        fetch.end()
        role.handle("r", cancel("a"))


def test_without_room_the_fetch_waits_too(puller):
    role = PrefillRole(make_engine(num_pages=8)[0], puller)
    role.handle("r", request("prefill", "a", range(100, 120)))
    role.step()
    role.handle("r", ask("b"))
    role.step()
    assert puller.fetches == []
    role.handle("r", cancel("a"))
    role.step()
    [fetch] = puller.fetches
    fetch.end()
    finish(role, "b")
    assert_empty(role)


def test_two_that_want_the_same_pages_fetch_them_once(role, puller):
    fetch = begin(role, puller, name="a")
    role.handle("r", ask("b", [*range(20), 7, 7]))
    role.step()
    assert len(puller.fetches) == 1
    fetch.arrive(5)
    role.handle("r", cancel("a"))
    report = finish(role, "b")
    assert (report.prefix_pages, report.fetched_pages) == (5, 0)
    fetch.end()
    assert_empty(role)


def test_others_go_on_meanwhile(role, puller):
    begin(role, puller)
    role.handle("r", request("prefill", "b", range(100, 110)))
    finish(role, "b")
    puller.fetches[0].end()
    finish(role, "a")
    assert_empty(role)


def test_a_failed_step_leaves_a_fetch_alone(puller):
    engine, runner = make_engine()
    role = PrefillRole(engine, puller)
    fetch = begin(role, puller)
    role.handle("r", request("prefill", "b", range(100, 104)))
    runner.fail = RuntimeError("no such luck")
    with pytest.raises(RuntimeError):
        role.step()
    role.fail_running(WorkerLost("the engine failed"))
    assert [update.request_id for update in updates(role)] == ["b"]
    runner.fail = None
    fetch.arrive(5)
    fetch.end()
    assert finish(role, "a").fetched_pages == 5
    assert_empty(role)


def test_a_colocated_worker_fetches_too_and_names_nothing(puller):
    role = ColocatedRole(make_engine()[0], puller)
    fetch = begin(role, puller, max_tokens=3)
    fetch.arrive(5)
    fetch.end()
    for _ in range(4):
        role.step()
    told = updates(role)
    assert [list(update.token_ids) for update in told] == [[1022], [1023], [1024]]
    assert told[0].prefill.fetched_pages == 5
    assert not any(update.sealed for update in told)
    assert_empty(role)

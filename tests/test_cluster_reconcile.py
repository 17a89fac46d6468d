"""Every move of the controller, without a process: desired, actual and a clock in, actions out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.reconcile import (
    Drain,
    Failures,
    Phase,
    Policy,
    Pool,
    Start,
    Stop,
    WorkerView,
    reconcile,
    settle,
)

NONE = Failures()
POLICY = Policy(first_delay_s=1.0, max_delay_s=8.0, max_failures=3, stable_s=20.0, drain_timeout_s=60.0)
NOW = 1000.0


def worker(number: int, phase: Phase = Phase.READY, **changes: object) -> WorkerView:
    view = WorkerView(worker_id=f"w-{number}", number=number, phase=phase, since=NOW - 100)
    return replace(view, **changes)  # type: ignore[arg-type]


def moves(desired: int, *workers: WorkerView, failures: Failures = NONE, now: float = NOW) -> list[object]:
    return list(reconcile({"decode": Pool(desired, workers, failures)}, now, POLICY))


@pytest.mark.parametrize("desired", [0, 1, 3])
def test_an_empty_pool_starts_what_is_desired(desired: int) -> None:
    assert moves(desired) == [Start("decode")] * desired


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.READY])
def test_nothing_to_do_when_actual_is_as_desired(phase: Phase) -> None:
    assert moves(1, worker(1, phase)) == []


@pytest.mark.parametrize("phase", [Phase.DRAINING, Phase.STOPPING])
def test_a_leaving_worker_does_not_count(phase: Phase) -> None:
    leaving = worker(1, phase, since=NOW)
    assert moves(1, leaving) == [Start("decode")]
    assert moves(0, leaving) == []


def test_each_pool_alone() -> None:
    pools = {
        "prefill": Pool(2, (worker(1),)),
        "decode": Pool(0, (worker(2),)),
        "router": Pool(1, (worker(3),), Failures(9, NOW + 5, "dead")),
    }
    assert reconcile(pools, NOW, POLICY) == [Start("prefill"), Drain("decode", "w-2")]


def test_a_starting_worker_leaves_first_and_is_stopped() -> None:
    assert moves(1, worker(1, load=0), worker(2, Phase.STARTING)) == [Stop("decode", "w-2")]


def test_the_least_loaded_drains_then_the_newest() -> None:
    workers = (worker(1, load=5), worker(2, load=1), worker(3, load=1), worker(4, load=9))
    assert moves(3, *workers) == [Drain("decode", "w-3")]
    assert moves(1, *workers) == [Drain("decode", name) for name in ("w-3", "w-2", "w-1")]


def test_a_drained_worker_is_stopped_when_idle_or_too_late() -> None:
    busy = worker(1, Phase.DRAINING, since=NOW - 59)
    assert moves(0, busy) == []
    assert moves(0, replace(busy, idle=True)) == [Stop("decode", "w-1")]
    assert moves(0, busy, now=NOW + 1) == [Stop("decode", "w-1")]


def test_delays_double_and_are_bounded() -> None:
    failures, now, delays = Failures(), NOW, []
    for _ in range(6):
        failures = failures.add("died", now, POLICY)
        delays.append(failures.retry_at - now)
        now = failures.retry_at
    assert delays == [1, 2, 4, 8, 8, 8]


def test_failures_within_one_delay_count_once() -> None:
    failures = Failures().add("first", NOW, POLICY).add("second", NOW + 0.9, POLICY)
    assert (failures.count, failures.retry_at, failures.reason) == (1, NOW + 1, "second")
    assert failures.add("third", NOW + 1, POLICY).count == 2


def test_failed_after_a_row_or_at_once_when_hopeless() -> None:
    failures, now = Failures(), NOW
    for count in range(1, 4):
        failures = failures.add("died", now, POLICY)
        now = failures.retry_at
        assert failures.is_failed(POLICY) == (count == 3)
    assert Failures().add("no weights", NOW, POLICY, hopeless=True).is_failed(POLICY)
    # Also where it falls into the delay of another.
    assert Failures().add("died", NOW, POLICY).add("no weights", NOW, POLICY, hopeless=True).is_failed(POLICY)


def test_a_dead_node_is_replaced_in_full_after_the_delay() -> None:
    failures = Failures(1, NOW)
    assert moves(3, worker(1), failures=failures, now=NOW - 0.1) == []
    assert moves(3, worker(1), failures=failures) == [Start("decode")] * 2


def test_a_row_of_failures_tries_one_at_a_time_and_never_gives_up() -> None:
    failures = Failures(99, NOW)
    assert moves(3, failures=failures) == [Start("decode")]
    assert moves(3, worker(1, Phase.STARTING), failures=failures) == []


def test_failures_do_not_stop_shrinking() -> None:
    assert moves(0, worker(1), failures=Failures(9, NOW + 99)) == [Drain("decode", "w-1")]


def test_failures_are_forgotten_once_all_are_stable() -> None:
    failures = Failures(2, NOW, "died")
    old, young = worker(1, since=NOW - 20), worker(2, since=NOW - 19.9)
    assert settle(Pool(2, (old, young), failures), NOW, POLICY) == failures
    assert settle(Pool(2, (old, young), failures), NOW + 0.2, POLICY) == Failures()
    assert settle(Pool(1, (old, young), failures), NOW, POLICY) == Failures()
    assert settle(Pool(1, (replace(old, phase=Phase.STARTING),), failures), NOW, POLICY) == failures
    assert settle(Pool(0, (), failures), NOW, POLICY) == Failures()


_workers = st.lists(
    st.builds(
        WorkerView,
        worker_id=st.just(""),
        number=st.integers(0, 9),
        phase=st.sampled_from(Phase),
        since=st.floats(NOW - 200, NOW),
        load=st.integers(0, 9),
        idle=st.booleans(),
    ),
    max_size=8,
).map(lambda found: tuple(replace(w, worker_id=f"w-{i}", number=i) for i, w in enumerate(found)))


@given(desired=st.integers(0, 8), workers=_workers)
def test_carrying_the_actions_out_leads_to_the_desired_number(desired: int, workers: tuple[WorkerView, ...]) -> None:
    by_id = {w.worker_id: w for w in workers}
    for number, action in enumerate(moves(desired, *workers), start=100):
        match action:
            case Start():
                by_id[f"w-{number}"] = worker(number, Phase.STARTING)
            case Drain(worker_id=worker_id):
                assert by_id[worker_id].phase is Phase.READY
                by_id[worker_id] = replace(by_id[worker_id], phase=Phase.DRAINING, since=NOW, idle=False)
            case Stop(worker_id=worker_id):
                assert by_id[worker_id].phase in (Phase.STARTING, Phase.DRAINING)
                by_id[worker_id] = replace(by_id[worker_id], phase=Phase.STOPPING)
    active = [w for w in by_id.values() if w.phase in (Phase.STARTING, Phase.READY)]
    assert len(active) == desired
    assert moves(desired, *by_id.values()) == []  # a second look changes nothing

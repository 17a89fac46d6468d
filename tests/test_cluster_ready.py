"""Waiting for a cluster: what is shown, and when it is given up."""

import time

import pytest

from cluster import ready
from cluster.ready import failure, progress, wait_ready
from protos import errors
from protos.v1 import operator_pb2

STARTING, READY = operator_pb2.WORKER_STATE_STARTING, operator_pb2.WORKER_STATE_READY
DRAINING, FAILED = operator_pb2.WORKER_STATE_DRAINING, operator_pb2.WORKER_STATE_FAILED


def status(ready: bool = False, **pools: list[tuple[int, str]]) -> operator_pb2.StatusResponse:
    """`prefill=[(state, message), ...]`; one worker is desired of each pool."""
    return operator_pb2.StatusResponse(
        ready=ready,
        routers=["h:1"],
        pools=[
            operator_pb2.PoolStatus(
                pool=pool,
                desired=1,
                workers=[
                    operator_pb2.WorkerStatus(worker_id=f"{pool}-{number}", state=state, message=message)
                    for number, (state, message) in enumerate(workers, 1)
                ],
            )
            for pool, workers in pools.items()
        ],
    )


@pytest.fixture
def answers(monkeypatch) -> list[operator_pb2.StatusResponse]:
    """What the operator says, one after another; the last is repeated."""
    said: list[operator_pb2.StatusResponse] = []
    monkeypatch.setattr(ready, "_POLL_S", 0.001)
    monkeypatch.setattr(
        "cluster.operator_client.OperatorClient.status", lambda self: said.pop(0) if len(said) > 1 else said[0]
    )
    return said


def test_progress_counts_and_says_what_the_first_does():
    said = status(prefill=[(STARTING, "loading the model")], decode=[(READY, "")], router=[(STARTING, "starting")])
    assert progress(said) == ("workers", "prefill 0/1, decode 1/1, router 0/1, prefill-1: loading the model")
    said = status(prefill=[(READY, "")], decode=[(READY, "")], router=[(STARTING, "")])
    assert progress(said) == ("router", "prefill 1/1, decode 1/1, router 0/1")


def test_failures_are_named():
    assert failure(status(prefill=[(READY, ""), (STARTING, "slow")])) == ""
    assert failure(status(prefill=[(FAILED, "no weights")], router=[(FAILED, "port")])) == (
        "prefill-1 failed: no weights; router-1 failed: port"
    )


def test_waits_until_ready_and_nobody_leaves(answers):
    shown = []
    answers += [
        status(decode=[(STARTING, "loading")]),
        status(ready=True, decode=[(READY, ""), (DRAINING, "")]),
        status(ready=True, decode=[(READY, "")]),
    ]
    assert wait_ready("h:2", time.monotonic() + 60, lambda *step: shown.append(step)) == "h:1"
    assert len(shown) == 2


def test_a_failed_pool_is_not_waited_for(answers):
    answers.append(status(decode=[(FAILED, "no weights")]))
    with pytest.raises(errors.FixTheSetup, match="no weights"):
        wait_ready("h:2", time.monotonic() + 60, lambda *_: None)


def test_the_deadline_says_what_was_missing(answers):
    answers.append(status(decode=[(STARTING, "loading the model")]))
    with pytest.raises(errors.DeadlineExceeded, match="decode-1: loading the model"):
        wait_ready("h:2", time.monotonic() + 0.05, lambda *_: None)


def test_no_controller_is_told_with_its_endpoint(unused_tcp_port):
    with pytest.raises(errors.WorkerLost, match=str(unused_tcp_port)):
        wait_ready(f"127.0.0.1:{unused_tcp_port}", time.monotonic() + 60, lambda *_: None)

"""A GPU that does not answer is given up."""

import pytest
import torch

from engine import event_wait
from engine.engine import Engine
from engine.event_wait import wait_for
from engine.reading import Reading
from engine_rig import Request
from protos.errors import WorkerLost
from role_kit import PAGE, CountingRunner, make_engine


class Happens:
    """An event that is seen at the look with this number."""

    def __init__(self, at: float) -> None:
        self.at = at
        self.looks = 0

    def query(self) -> bool:
        self.looks += 1
        return self.looks >= self.at


NEVER = float("inf")


def test_it_returns_when_the_event_has_happened():
    event = Happens(at=4)
    wait_for(event)
    assert event.looks == 4


def test_it_gives_up(monkeypatch):
    monkeypatch.setattr(event_wait, "_MOST_S", 0.02)
    with pytest.raises(WorkerLost, match="GPU"):
        wait_for(Happens(at=NEVER))


def test_a_reading_is_waited_for_with_a_deadline(monkeypatch):
    monkeypatch.setattr(event_wait, "_MOST_S", 0.02)
    tokens = torch.tensor([5, 6, 7])
    assert Reading(tokens, [2, 0], [], Happens(at=3)).ids() == [7, 5]
    with pytest.raises(WorkerLost):
        Reading(tokens, [0], [], Happens(at=NEVER)).ids()


def test_a_step_that_was_lost_takes_also_who_was_preempted_with_it(monkeypatch):
    """Its result never comes: it must not wait for that."""
    monkeypatch.setattr(event_wait, "_MOST_S", 0.02)

    class Stuck(CountingRunner):
        def launch(self, chunks):
            ids = super().launch(chunks).ids()
            return Reading(torch.tensor(ids), list(range(len(ids))), [], Happens(at=NEVER))

    scheduler = make_engine()[0].scheduler
    engine = Engine(scheduler, Stuck(behind=1))
    sequences = [Request(0, name, (1, 2, 3), 9).sequence(PAGE) for name in "ab"]
    for sequence in sequences:
        scheduler.add(sequence)
    engine.step()
    scheduler._preempt(sequences[1])
    with pytest.raises(WorkerLost):
        engine.step()
    assert scheduler.computing == sequences

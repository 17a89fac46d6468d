"""Where the time of a request went."""

import io
import re
import time

import pytest
from rich.console import Console

from diptych.client import Chunk
from diptych.phases import Phases
from diptych.report import Timeline, report
from protos.v1 import inference_pb2


def chunk(tokens: int, **last: object) -> Chunk:
    return Chunk(request_id="r", text="", token_ids=tuple(range(tokens)), **last)  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_tokens_of_one_message_share_its_time(clock):
    timeline = Timeline()
    for at, tokens in ((0.5, 1), (0.6, 1), (0.6, 0), (0.9, 3)):
        clock[0] = 100.0 + at
        timeline.note(chunk(tokens))
    assert timeline.first_token_ms == pytest.approx(500)
    assert timeline.token_gaps_ms == pytest.approx([100, 100, 100, 100])


def test_an_empty_answer_has_no_gaps(clock):
    timeline = Timeline()
    timeline.note(chunk(0))
    assert (timeline.first_token_ms, timeline.token_gaps_ms) == (0.0, [])


def test_the_table_has_a_column_for_each_answer(clock):
    stats = inference_pb2.RequestStats(
        queue_ms=1.25,
        pages_handed_over=3,
        bytes_handed_over=3 * 2**20,
        prompt_pages=5,
        prefill_prefix_pages=2,
        decode_prefix_pages=4,
        prefill_fetched_pages=1,
        fetch_ms=2.5,
        transport="shm",
    )
    last = chunk(1, usage=inference_pb2.Usage(prompt_tokens=11, completion_tokens=1), stats=stats)
    timeline = Timeline()
    timeline.note(last)
    out = io.StringIO()
    Console(file=out, width=120).print(report([("first", last, timeline), ("second", last, timeline)]))
    text = re.sub(" +", " ", out.getvalue())
    assert "first second" in text
    assert "queue 1.2 ms 1.2 ms" in text
    assert "pages handed over 3 (3.0 MiB, shm) 3 (3.0 MiB, shm)" in text
    assert "prefix pages hit 4 of 5 4 of 5" in text
    assert "prefix pages fetched 1 (2.5 ms) 1 (2.5 ms)" in text
    assert "between tokens, median - -" in text


def test_where_one_worker_did_both_nothing_is_said_of_a_hand_over(clock):
    stats = inference_pb2.RequestStats(
        prompt_pages=5, prefill_prefix_pages=2, prefill_worker="colocated-1", decode_worker="colocated-1"
    )
    last = chunk(1, usage=inference_pb2.Usage(prompt_tokens=11, completion_tokens=1), stats=stats)
    out = io.StringIO()
    Console(file=out, width=120).print(report([("", last, Timeline())]))
    lines = [re.sub("  +", ": ", line.strip()) for line in out.getvalue().splitlines()]
    assert {"decode joined: -", "pages handed over: -", "pulls took: -", "at prefill, at decode: -"} <= set(lines)
    assert {"prefix pages hit: 2 of 5", "workers: colocated-1"} <= set(lines)


def test_a_chunk_without_stats_is_refused():
    with pytest.raises(ValueError, match="last chunk"):
        report([("", chunk(1), Timeline())])


def test_phases_are_lines_with_their_times(clock):
    out = io.StringIO()
    with Phases(Console(file=out, width=80)) as phases:
        phases.show("model", "fetching [1]")
        clock[0] += 2
        phases.show("model", "converting")
        clock[0] += 1
        phases.show("ray", "")
        clock[0] += 4
    assert out.getvalue().splitlines() == ["✓ model 3.0 s", "✓ ray 4.0 s"]


def test_a_phase_that_fails_is_not_done():
    out = io.StringIO()
    with pytest.raises(KeyError), Phases(Console(file=out)) as phases:
        phases.show("model", "")
        raise KeyError
    assert out.getvalue() == ""

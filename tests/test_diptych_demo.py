"""`diptych demo`, as `make demo` runs it: the real model, and no process afterwards."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import processes
from cluster.state import StateFile

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

DEMO = [sys.executable, "-c", "from diptych.cli import main; main()", "demo"]


@pytest.fixture
def states(tmp_path, monkeypatch, demo_model) -> Path:
    monkeypatch.setenv("DIPTYCH_STATE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def test_it_answers_shows_where_the_time_went_and_leaves_nothing(states):
    done = subprocess.run(DEMO, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = re.sub(" +", " ", done.stdout)
    assert "Paris" in said
    assert "Rome" in said
    for row in ("queue", "prefill", "first token, at the client", "pages handed over", "between tokens, median"):
        assert re.search(rf"^ ?{row} \d", said, re.MULTILINE), said
    first, second = re.search(r"prefix pages hit (\d+) of \d+ (\d+) of \d+", said).groups()
    assert (int(first), int(second)) >= (0, 2)
    assert int(second) > int(first)
    assert "0 processes left" in said
    assert list(states.iterdir()) == []


def test_ctrl_c_cleans_up(states):
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        give_up = time.monotonic() + 60
        while not (found := list(states.glob("*/state.json"))) or '"phase": "ray"' not in found[0].read_text():
            assert time.monotonic() < give_up
            assert demo.poll() is None
            time.sleep(0.05)
        state = StateFile(found[0].parent.name).read()
        demo.send_signal(signal.SIGINT)
        _, err = demo.communicate(timeout=120)
    assert demo.returncode == 130
    assert "Traceback" not in err
    assert processes.find(Path(state.scratch)) == []
    assert not Path(state.scratch).exists()
    assert list(states.iterdir()) == []

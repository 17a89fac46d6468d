"""Finding and ending what is left of a cluster, and nothing else."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import processes

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"


def start(scratch: Path, *command: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen(command, env=os.environ | processes.mark(scratch), stdout=subprocess.PIPE, **options)


@pytest.fixture
def family(tmp_path) -> Iterator[list[subprocess.Popen]]:
    """A marked process, its marked child, and one of another cluster."""
    mine = start(tmp_path, "sh", "-c", "sleep 60 & echo started; wait")
    assert mine.stdout.readline()
    other = start(tmp_path / "other", "sleep", "60")
    yield [mine, other]
    for process in (mine, other):
        process.kill()
        process.wait()
        process.stdout.close()


def test_children_are_found_and_others_are_not(tmp_path, family):
    found = {process.pid for process in processes.find(tmp_path)}
    assert family[0].pid in found
    assert len(found) == 2
    assert family[1].pid not in found


def test_ending_leaves_none_and_spares_others(tmp_path, family):
    processes.end(tmp_path, patience_s=0.0)
    assert processes.find(tmp_path) == []
    assert family[1].poll() is None


def test_those_that_end_by_themselves_are_waited_for(tmp_path):
    with start(tmp_path, "sh", "-c", f"sleep 0.3; touch {tmp_path}/ended"):
        processes.end(tmp_path, patience_s=20.0)
    assert (tmp_path / "ended").exists()


def test_the_stubborn_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_TERM_S", 0.2)
    with start(tmp_path, sys.executable, "-c", STUBBORN) as process:
        assert process.stdout.readline()
        processes.end(tmp_path, patience_s=0.0)
        assert processes.find(tmp_path) == []


def test_a_process_that_wrote_over_its_environment_is_found_by_its_folder(tmp_path):
    """As Valkey and Ray's helpers do. A shell in the same folder is spared."""
    folder = tmp_path / "valkey"
    folder.mkdir()
    with (
        subprocess.Popen(["sleep", "60"], cwd=tmp_path) as shell,
        subprocess.Popen(["/bin/sleep", "60"], cwd=folder, env={}) as helper,
    ):
        assert [process.pid for process in processes.find(tmp_path)] == [helper.pid]
        helper.kill()
        shell.kill()


def test_nothing_to_end_takes_no_time(tmp_path):
    begun = time.monotonic()
    processes.end(tmp_path, patience_s=30.0)
    assert time.monotonic() - begun < 10

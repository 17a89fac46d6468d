"""The state file and the lock that says whether a supervisor lives."""

import subprocess
import sys

import pytest

from cluster.state import ClusterState, Lock, StateFile, is_supervised
from protos import errors

HOLD = """
import sys, time
from cluster.state import Lock, StateFile
with Lock(StateFile("a")) as lock:
    assert lock.acquire()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def file(tmp_path, monkeypatch) -> StateFile:
    monkeypatch.setenv("DIPTYCH_STATE", str(tmp_path / "state"))
    return StateFile("a")


def test_what_is_written_is_read_and_only_ours_to_read(file):
    assert file.read() is None
    state = ClusterState(name="a", phase="ready", pid=7, router="h:1", operator="h:2")
    file.write(state)
    assert file.read() == state
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in file.folder.iterdir()] == ["state.json"]
    file.remove()
    assert file.read() is None
    file.remove()


def test_a_broken_file_is_named(file):
    file.make_folder()
    file.path.write_text('{"name": 3')
    with pytest.raises(errors.FixTheSetup, match=r"state\.json"):
        file.read()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "f").touch()
    monkeypatch.setenv("DIPTYCH_STATE", str(tmp_path / "f"))
    with pytest.raises(errors.FixTheSetup, match="DIPTYCH_STATE"):
        StateFile("a").make_folder()


def test_without_a_variable_it_is_in_the_users_folder(monkeypatch):
    monkeypatch.delenv("DIPTYCH_STATE", raising=False)
    assert "diptych" in StateFile("a").folder.parts


def test_the_lock_is_held_by_one_and_freed_by_a_kill(file):
    assert not is_supervised(file)
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert is_supervised(file)
        with Lock(file) as second:
            assert not second.acquire()
        holder.kill()
    assert not is_supervised(file)

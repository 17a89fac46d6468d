"""Pages tell what was said: nobody else may look into their folder on a disk."""

import os
import stat
from pathlib import Path

import pytest

from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.tiers.page_files import PageFiles
from kvstore_owner import SMALL
from protos.errors import FixTheSetup

KEY = PageKey(bytes(range(16)))


@pytest.fixture(autouse=True)
def generous_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*")) if path.is_dir()}


def write_one(folder: Path) -> None:
    files = PageFiles(folder, SMALL)
    files.write(Lineage(KEY, KEY, None), memoryview(bytes(SMALL.page_bytes)), 1)
    files.close()


def test_folders_and_files_are_this_users_alone(tmp_path):
    folder = tmp_path / "new" / "store"
    write_one(folder)
    assert modes(folder) == {0o700}
    [page] = folder.rglob("*.page")
    assert stat.S_IMODE(page.stat().st_mode) == 0o600


def test_a_folder_that_others_could_read_is_closed_to_them(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir(mode=0o755)
    write_one(folder)
    assert modes(folder) == {0o700}


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    folder = tmp_path / "store"
    folder.mkdir(mode=0o755)
    with pytest.raises(FixTheSetup, match="belongs to another user"):
        PageFiles(folder, SMALL)
    assert modes(folder) == {0o755}
    assert not list(folder.iterdir())

"""Pages on a disk: whatever happened to a file, what is read is what was written, or nothing."""

import os
import subprocess
import sys

import pytest

from kvstore.keys import PageKey
from kvstore.lineage import Lineage
from kvstore.page_format import PageFormat
from kvstore.tiers.page_files import CorruptFile, PageFiles
from kvstore_owner import SMALL, random_page
from protos import errors

KEYS = [PageKey(bytes([number]) * 16) for number in range(1, 6)]
FIRST = Lineage(KEYS[0], KEYS[0], None)
SECOND = Lineage(KEYS[1], KEYS[0], KEYS[0])


@pytest.fixture
def files(tmp_path):
    files = PageFiles(tmp_path / "pages", SMALL)
    yield files
    files.close()


def page(seed: int) -> memoryview:
    return random_page(seed, SMALL).data


def read(files: PageFiles, key: PageKey) -> bytes:
    room = bytearray(SMALL.page_bytes)
    files.read(key, memoryview(room))
    return bytes(room)


def path_of(tmp_path, key: PageKey):
    return tmp_path / "pages" / key.hex()[:2] / f"{key.hex()}.page"


def test_what_was_written_is_read(files):
    files.write(FIRST, page(1), 5)
    files.write(SECOND, page(2), 6)
    assert read(files, KEYS[0]) == bytes(page(1))
    assert read(files, KEYS[1]) == bytes(page(2))
    files.write(FIRST, page(3), 7)
    assert read(files, KEYS[0]) == bytes(page(3))
    files.remove(KEYS[0])
    files.remove(KEYS[0])
    with pytest.raises(CorruptFile, match="gone"):
        read(files, KEYS[0])


@pytest.mark.parametrize("place", ["magic", "format", "key", "parent", "first byte", "last byte", "checksum"])
def test_a_changed_byte_anywhere_is_found(files, tmp_path, place):
    files.write(SECOND, page(1), 5)
    path = path_of(tmp_path, KEYS[1])
    data = bytearray(path.read_bytes())
    at = {"magic": 0, "format": 20, "key": 36, "parent": 68, "first byte": 92, "last byte": -33, "checksum": -1}[place]
    data[at] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CorruptFile):
        read(files, KEYS[1])


@pytest.mark.parametrize("size", [0, 50, 84, 1000, -1, +1])
def test_a_file_of_another_length_is_found_when_read_and_when_scanned(files, tmp_path, size):
    files.write(FIRST, page(1), 5)
    path = path_of(tmp_path, KEYS[0])
    os.truncate(path, size if size > 1 or size == 0 else files.file_bytes + size)
    with pytest.raises(CorruptFile):
        read(files, KEYS[0])
    assert files.scan() == ([], 1)
    assert not path.exists()


def test_a_file_under_anothers_name_is_found(files, tmp_path):
    files.write(FIRST, page(1), 5)
    path_of(tmp_path, KEYS[1]).parent.mkdir()
    path_of(tmp_path, KEYS[0]).rename(path_of(tmp_path, KEYS[1]))
    with pytest.raises(CorruptFile):
        read(files, KEYS[1])
    assert files.scan() == ([], 1)


def test_a_scan_tells_lineages_in_the_order_of_last_use(files):
    for lineage, stamp in ((FIRST, 30), (SECOND, 10), (Lineage(KEYS[2], KEYS[0], KEYS[1]), 20)):
        files.write(lineage, page(1), stamp)
    assert [lineage.key for lineage in files.scan()[0]] == [KEYS[1], KEYS[2], KEYS[0]]
    files.touch(KEYS[1], 40)
    files.touch(KEYS[4], 40)  # there is none: nothing to note
    found, dropped = files.scan()
    assert [lineage.key for lineage in found] == [KEYS[2], KEYS[0], KEYS[1]]
    assert found[2] == SECOND
    assert dropped == 0


def test_a_scan_drops_what_is_of_another_format_and_what_was_never_finished(tmp_path):
    other = PageFormat(SMALL.layers, SMALL.kv_heads * 2, SMALL.page_size, SMALL.head_dim // 2, SMALL.dtype)
    assert other.page_bytes == SMALL.page_bytes
    files = PageFiles(tmp_path / "pages", other)
    files.write(FIRST, page(1), 5)
    files.close()
    files = PageFiles(tmp_path / "pages", SMALL)
    files.write(SECOND, page(2), 5)
    (path_of(tmp_path, KEYS[1]).parent / "half.part").write_bytes(b"half")
    assert files.scan() == ([SECOND], 1)
    assert [path.name for path in (tmp_path / "pages").rglob("*.*")] == [f"{KEYS[1].hex()}.page"]
    files.close()


def test_a_write_that_the_disk_refuses_leaves_nothing(files, tmp_path, monkeypatch):
    def full(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        files.write(FIRST, page(1), 5)
    assert not list((tmp_path / "pages").rglob("*.*"))


def test_one_folder_serves_one_process_at_a_time(tmp_path):
    program = (
        "import sys; from pathlib import Path; from kvstore.tiers.page_files import PageFiles\n"
        "from kvstore_owner import SMALL; PageFiles(Path(sys.argv[1]), SMALL)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    files = PageFiles(tmp_path, SMALL)
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "FixTheSetup" in refused.stderr
    assert "used by another page store" in refused.stderr
    files.close()
    subprocess.run(command, env=environment, check=True, timeout=60)


def test_a_folder_that_cannot_be_made_is_a_matter_of_setup(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.FixTheSetup, match="file/pages"):
        PageFiles(tmp_path / "file" / "pages", SMALL)

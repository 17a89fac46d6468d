"""Segments: what another process sees of them, and what is left when their owner is killed."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvstore.segment import Segment
from kvstore_owner import INCARNATION, SMALL, Owner
from protos import errors

READER = """
import json, sys
from kvstore.page_format import PageFormat
from kvstore.segment import Segment
address, incarnation = sys.argv[1:]
segment = Segment.open(address, int(incarnation), PageFormat(2, 2, 16, 8, "float32"))
print(json.dumps({
    "generations": segment.generations.tolist(),
    "first_bytes": [bytes(page[:4]).hex() for page in segment.pages],
    "writable": segment.pages.flags.writeable or segment.generations.flags.writeable,
}))
"""


def test_another_process_sees_bytes_and_generations_and_cannot_write():
    segment = Segment.create(SMALL, 3, INCARNATION)
    segment.pages[1] = np.arange(SMALL.page_bytes) % 251
    segment.generations[:] = [4, 5, 2**40]
    answer = subprocess.run(
        [sys.executable, "-c", READER, segment.address, str(INCARNATION)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    seen = json.loads(answer.stdout)
    assert seen == {
        "generations": [4, 5, 2**40],
        "first_bytes": ["00000000", "00010203", "00000000"],
        "writable": False,
    }
    segment.close()


def test_shapes_and_alignment():
    segment = Segment.create(SMALL, 3, INCARNATION)
    assert segment.pages.shape == (3, SMALL.page_bytes)
    assert segment.pages.ctypes.data % 64 == 0
    assert segment.generations.ctypes.data % 8 == 0
    assert segment.generations.tolist() == [0, 0, 0]
    segment.close()
    with pytest.raises(ValueError, match="num_pages"):
        Segment.create(SMALL, 0, INCARNATION)


def test_the_largest_incarnation_fits():
    segment = Segment.create(SMALL, 1, 2**63 - 1)
    Segment.open(segment.address, 2**63 - 1, SMALL).close()
    segment.close()


def test_another_life_is_refused():
    segment = Segment.create(SMALL, 1, INCARNATION)
    with pytest.raises(errors.WorkerLost, match="another life"):
        Segment.open(segment.address, INCARNATION + 1, SMALL)
    segment.close()


def test_another_format_is_refused_with_the_difference():
    segment = Segment.create(SMALL, 1, INCARNATION)
    with pytest.raises(errors.FormatMismatch, match="page_size 64 against 16, dtype bfloat16 against float32"):
        Segment.open(segment.address, INCARNATION, replace(SMALL, page_size=64, dtype="bfloat16"))
    segment.close()


def test_addresses_that_are_no_segments_are_refused(tmp_path: Path):
    plain = (tmp_path / "plain").open("w+b")
    plain.truncate(1 << 20)
    memfd = os.memfd_create("short", os.MFD_ALLOW_SEALING)
    read_end, write_end = os.pipe()
    addresses = [
        *(f"/proc/{os.getpid()}/fd/{fd}" for fd in (plain.fileno(), memfd, read_end, write_end, 987_654)),
        "/proc/4194305/fd/3",  # above the highest process number
        "/proc/self/fd/0",
        "/etc/passwd",
        "../../etc/passwd",
        "",
    ]
    for address in addresses:
        with pytest.raises(errors.WorkerLost):
            Segment.open(address, INCARNATION, SMALL)
    plain.close()
    for fd in (memfd, read_end, write_end):
        os.close(fd)


def test_no_descriptor_stays_open():
    before = sorted(os.listdir("/proc/self/fd"))
    segment = Segment.create(SMALL, 1, INCARNATION)
    reader = Segment.open(segment.address, INCARNATION, SMALL)
    for bad in (INCARNATION + 1, 0):
        with pytest.raises(errors.WorkerLost):
            Segment.open(segment.address, bad, SMALL)
    with pytest.raises(errors.FormatMismatch):
        Segment.open(segment.address, INCARNATION, replace(SMALL, layers=3))
    for _ in range(2):
        reader.close()
        segment.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        _ = segment.pages


def test_arrays_outlive_the_segment_that_they_came_from():
    segment = Segment.create(SMALL, 2, INCARNATION)
    pages = segment.pages
    pages[1] = 9
    segment.close()
    assert (pages[1] == 9).all()


def test_kill_9_of_the_owner_leaves_nothing_behind():
    shared_before, maps_before = set(os.listdir("/dev/shm")), maps_of_segments()
    with Owner() as owner:
        [(page, _)] = owner.fill(7)
        reader = Segment.open(owner.endpoints["shm"], INCARNATION, SMALL)
        assert (reader.pages[page] == 7).all()
        assert reader.owner_alive()
        owner.kill()
        deadline = time.monotonic() + 5
        while reader.owner_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not reader.owner_alive()
        with pytest.raises(errors.WorkerLost):
            Segment.open(owner.endpoints["shm"], INCARNATION, SMALL)
    assert maps_of_segments() == maps_before + 1
    reader.close()
    assert maps_of_segments() == maps_before  # this was the last that held the memory
    assert set(os.listdir("/dev/shm")) == shared_before


def maps_of_segments() -> int:
    return len(re.findall("diptych-pages", Path("/proc/self/maps").read_text()))

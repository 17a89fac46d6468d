"""compute-sanitizer watches small cases of the kernels: no access out of bounds or misaligned, no race in a program."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).parents[2]
CASES = [
    "test_hopper_decode.py::test_ragged_lengths[64-16]",
    "test_decode_options.py::test_all_options_together",
    "test_decode_options.py::test_several_queries_of_few_sequences[ragged-128-128-hopper]",
    "test_cascade.py::test_soft_cap_and_float16",
    "test_small_shapes.py",
]


def sanitize(tool_options: list[str], cases: list[str]) -> str:
    """What compute-sanitizer and pytest print of these tests, all of which have to pass."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    assert Path(tool).exists(), "compute-sanitizer is not there: it is part of the CUDA toolkit"
    pytest_options = "-m gpu --noconftest -p no:cacheprovider -c tests/gpu/pytest.ini --rootdir .".split()
    done = subprocess.run(
        [
            *(tool, *tool_options, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"),
            *pytest_options,
            *(f"tests/gpu/{case}" for case in cases),
        ],
        cwd=ROOT,
        # Each tensor in memory of its own, so that what lies beyond it is nobody's.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    said = done.stdout + done.stderr
    assert re.search(r"^\d+ passed", said, re.MULTILINE), said[-5000:]
    assert "ERROR SUMMARY" in said or "RACECHECK SUMMARY" in said, said[-5000:]
    return said


def test_memcheck():
    said = sanitize(["--tool", "memcheck"], CASES)
    assert "ERROR SUMMARY: 0 errors" in said, said[-5000:]


def test_racecheck():
    """Triton's warp_specialize tells the waiting warps what to run through a byte of its own, which they read at the
    kernel's start, around a barrier that racecheck does not follow. Nothing else of ours may race; hazards within
    cuBLAS's kernels (nvjet), which compute what is expected, are not ours."""
    options = ["--tool", "racecheck", "--racecheck-report", "hazard", "--print-limit", "1000000"]
    said = sanitize([*options, "--show-backtrace", "no"], ["test_small_shapes.py"])
    hazards = said.split(" hazard detected at ")[1:]
    summary = f"RACECHECK SUMMARY: {len(hazards)} hazards displayed ({len(hazards)} errors, 0 warnings)"
    assert summary in said, said[-3000:]
    others = Counter()
    for hazard in hazards:
        at = re.findall(r"(Read|Write) Thread .* at (\S+)", hazard)
        reads = [place for kind, place in at if kind == "Read"]
        start = reads and re.fullmatch(r"(prefill|decode)_kernel\+0x1[0-9a-f]{2}", reads[0])
        cublas = at and all(place.startswith("nvjet_") for _, place in at)
        if not start and not cublas:
            others[tuple(at)] += 1
    assert not others, others.most_common(9)

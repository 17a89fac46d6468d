"""compute-sanitizer watches small cases of the attention kernels: no access out of bounds, none misaligned."""

import os
import shutil
import subprocess
import sys
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
]


def test_memcheck():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    assert Path(tool).exists(), "compute-sanitizer is not there: it is part of the CUDA toolkit"
    pytest_options = [
        "-m",
        "gpu",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-c",
        "tests/gpu/pytest.ini",
        "--rootdir",
        ".",
    ]
    done = subprocess.run(
        [
            *(tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"),
            *pytest_options,
            *(f"tests/gpu/{case}" for case in CASES),
        ],
        cwd=ROOT,
        # Each tensor in memory of its own, so that what lies beyond it is nobody's.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
    assert " passed" in done.stdout

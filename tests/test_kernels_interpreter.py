"""Runs kernels_interpreted*.py where Triton's interpreter is on: Triton reads that once, at its import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("part", ["", "_decode", "_flash", "_sample"])
def test_triton_kernels_equal_their_twins(part):
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 cannot read a loop's bounds with NumPy 2.4 or later")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / f"kernels_interpreted{part}.py")],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

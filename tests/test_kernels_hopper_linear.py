"""Products of one or two rows on Hopper: what is refused, and compilation without a GPU, no register spilled."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.driver import driver

from kernels.capability import has_hopper_linear
from kernels.hopper_linear import MAX_ROWS, check_linear, linear_arguments, why_not
from kernels.hopper_linear_kernel import linear_kernel
from kernels_offline import HOPPER, OfflineDriver, assert_no_spills

BF16 = torch.bfloat16
WIDE_LOAD = r"ld\.global\S*\.v4\.b32"  # 16 bytes, or the bandwidth is lost


@pytest.fixture
def compile_kernel(monkeypatch, tmp_path) -> Callable[..., Any]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", OfflineDriver(HOPPER))

    def compiled(kernel: Any, arguments: tuple[object, ...], constants: dict[str, object]) -> Any:
        done = kernel.warmup(*arguments, grid=(132,), **constants)
        assert_no_spills(done, tmp_path)
        return done

    return compiled


def product(rows: int, outs: int, ins: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, ins, dtype=dtype), torch.zeros(outs, ins, dtype=dtype)


@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_compiles(compile_kernel, dtype, bias, rows):
    x, w = product(rows, 4096, 14336, dtype)
    out = torch.zeros(rows, 4096, dtype=dtype)
    done = compile_kernel(linear_kernel, *linear_arguments(x, w, w[:, 0].contiguous() if bias else None, out, True))
    assert "griddepcontrol.wait" in done.asm["ptx"]
    assert re.search(WIDE_LOAD, done.asm["ptx"])


@pytest.mark.parametrize(
    ("rows", "w", "reason"),
    [
        (1, torch.zeros(8, 16, dtype=BF16), ""),
        (1, torch.zeros(7, 24, dtype=torch.float16), ""),
        (1, torch.zeros(8, 32, dtype=BF16)[:, 8:24], ""),
        (MAX_ROWS, torch.zeros(8, 16, dtype=BF16), ""),
        (0, torch.zeros(8, 16, dtype=BF16), "0 rows"),
        (MAX_ROWS + 1, torch.zeros(8, 16, dtype=BF16), f"{MAX_ROWS + 1} rows"),
        (1, torch.zeros(8, 16), "float32"),
        (1, torch.zeros(8, 12, dtype=BF16), "w's rows"),
        (1, torch.zeros(8, 20, dtype=BF16)[:, :16], "w's rows"),
        (1, torch.zeros(16, 8, dtype=BF16).t(), "w's rows"),
        (1, torch.zeros(8, 32, dtype=BF16)[:, 4:20], "w's rows"),
    ],
)
def test_what_cublas_does_has_a_reason(rows, w, reason):
    assert reason in why_not(rows, w)
    assert bool(reason) == bool(why_not(rows, w))


def test_wrong_arguments_are_named():
    x, w = product(1, 8, 16)
    check_linear(x, w, torch.zeros(8, dtype=BF16))
    for arguments, name in (
        ((x[:, :8], w, None), "w must be"),
        ((x.half(), w, None), "w is"),
        ((torch.zeros(17, 16, dtype=BF16), w, None), "17 rows"),
        ((x, w, torch.zeros(7, dtype=BF16)), "bias"),
        ((x, w, torch.zeros(8)), "bias"),
        ((x, w, torch.zeros(16, dtype=BF16)[::2]), "bias"),
    ):
        with pytest.raises(ValueError, match=name):
            check_linear(*arguments)


def test_a_cpu_is_no_hopper():
    assert not has_hopper_linear(*product(1, 8, 16))

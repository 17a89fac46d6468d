"""Kernels are compiled side by side, each once, and nothing that fails is lost."""

import threading

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from kernels.resident_rows import advance_rows_triton
from kernels.warm_up import warm_up
from kernels_offline import HOPPER, compile_launches


def test_calls_run_side_by_side_in_inference_mode():
    together = threading.Barrier(3, timeout=30)  # breaks unless all three are there at once
    modes = []

    def call():
        together.wait()
        modes.append(torch.is_inference_mode_enabled())

    warm_up([call] * 3)
    assert modes == [True] * 3


def test_an_error_comes_out_when_the_others_have_ended():
    done = []
    with pytest.raises(ZeroDivisionError):
        warm_up([lambda: 1 / 0, lambda: done.append(1)])
    assert done == [1]


def test_a_kernel_that_many_wait_for_is_compiled_once(monkeypatch, tmp_path):
    compile_launches(monkeypatch, tmp_path, HOPPER)
    compiled = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, src, cache_hit, **rest: compiled.append(cache_hit))
    ids, lengths = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    warm_up([lambda: advance_rows_triton(ids, lengths, ids)] * 4)
    assert compiled == [False]

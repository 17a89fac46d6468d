"""Each load fills the same tensors, and leaves nothing of the load before."""

import numpy as np
import torch

from engine.static_inputs import StaticInputs

CPU = torch.device("cpu")


def make():
    blank = {"slots": np.full(5, -1), "table": np.zeros((2, 3), np.int32), "flags": np.ones(3, np.int32)}
    return StaticInputs(blank, CPU)


def test_tensors_begin_blank():
    inputs = make()
    assert inputs["slots"].tolist() == [-1] * 5
    assert inputs["table"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert (inputs["slots"].dtype, inputs["table"].dtype) == (torch.int64, torch.int32)


def test_arrays_fill_the_beginning_and_the_rest_is_blank_again():
    inputs = make()
    places = {name: inputs[name].data_ptr() for name in ("slots", "table", "flags")}
    inputs.load({"slots": np.arange(5), "table": np.full((2, 3), 7, np.int32), "flags": np.zeros(3, np.int32)})
    inputs.load({"slots": np.array([8, 9]), "table": np.array([[4, 5]], np.int32)})
    assert inputs["slots"].tolist() == [8, 9, -1, -1, -1]
    assert inputs["table"].tolist() == [[4, 5, 0], [0, 0, 0]]
    assert inputs["flags"].tolist() == [1, 1, 1]
    assert places == {name: inputs[name].data_ptr() for name in places}


def test_tensors_are_aligned_for_wide_loads():
    inputs = make()
    assert (inputs["table"].data_ptr() - inputs["slots"].data_ptr()) % 16 == 0
    assert (inputs["flags"].data_ptr() - inputs["slots"].data_ptr()) % 16 == 0

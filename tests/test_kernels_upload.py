"""Arrays become tensors of the same numbers. What a GPU does with them is in tests/gpu."""

import numpy as np
import torch

from kernels.upload import download, upload

CPU = torch.device("cpu")


def test_numbers_types_and_shapes_are_kept():
    arrays = [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.array([1.5], dtype=np.float32),
        np.zeros(0, dtype=np.int32),
    ]
    tensors = upload(arrays, CPU)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype


def test_what_is_on_the_host_stays():
    tensor = torch.arange(3)
    assert download(tensor) is tensor

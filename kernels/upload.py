"""Arrays from the host to the device, and back, in copies that nothing waits for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: what kernels load at once


def upload(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on `device`, in the order of its current stream. On a CPU they share their memory.

    From ordinary memory a copy to a GPU waits until all that was launched before it is done; from pinned memory, which
    torch keeps until the copy is over, it does not.
    """
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for array, part in zip(arrays, torch.split(pinned, sizes), strict=True):
        part.numpy()[: array.nbytes] = array.reshape(-1).view(np.uint8)
    parts = torch.split(pinned.to(device, non_blocking=True), sizes)
    return [_like(part[: array.nbytes], array) for array, part in zip(arrays, parts, strict=True)]


def _like(part: Tensor, array: npt.NDArray[Any]) -> Tensor:
    return part.view(torch.from_numpy(array[:0]).dtype).view(array.shape)


def download(tensor: Tensor) -> Tensor:
    """A copy on the host, there once the current stream has come so far; a CPU's tensor as it is."""
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)

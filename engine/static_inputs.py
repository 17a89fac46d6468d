"""Arrays at fixed places on the device: what a CUDA graph reads, loaded anew before each replay."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: what kernels load at once
Array = npt.NDArray[Any]


class StaticInputs:
    """Tensors that share one buffer, so that one copy loads them all."""

    def __init__(self, blank: Mapping[str, Array], device: torch.device) -> None:
        """`blank` gives each tensor's name, type and shape, and what it holds where nothing else is loaded."""
        self._blank = dict(blank)
        self._places: dict[str, slice] = {}
        size = 0
        for name, array in blank.items():
            self._places[name] = slice(size, size + array.nbytes)
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self._views = {name: self._view(self._buffer, name) for name in blank}
        self.load({})

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def load(self, arrays: Mapping[str, Array]) -> None:
        """Put each array at the beginning of its tensor, in the order of the current stream; nothing waits for it."""
        pinned = torch.empty(self._buffer.shape, dtype=torch.uint8, pin_memory=self._buffer.is_cuda)
        for name, blank in self._blank.items():
            view = self._view(pinned, name).numpy()
            view[...] = blank
            if name in arrays:
                view[tuple(slice(length) for length in arrays[name].shape)] = arrays[name]
        self._buffer.copy_(pinned, non_blocking=True)

    def _view(self, buffer: Tensor, name: str) -> Tensor:
        blank = self._blank[name]
        return buffer[self._places[name]].view(torch.from_numpy(np.empty(0, blank.dtype)).dtype).view(blank.shape)

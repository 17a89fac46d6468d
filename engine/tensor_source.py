"""Where a model's tensors come from: files, or a generator of random numbers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]  # by the tensors' Hugging Face names


class TensorSource(ABC):
    """Gives each of the tensors in `shapes` once, on `device`."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self.device = device
        self._shapes = shapes

    def read(self, names: list[str], dtype: torch.dtype) -> Tensor:
        """The named tensors, one below the other. Made in place: besides the result, at most one of them in memory."""
        shapes = [self._shapes[name] for name in names]
        rows = [shape[0] for shape in shapes]
        whole = torch.empty(sum(rows), *shapes[0][1:], dtype=dtype, device=self.device)
        for name, part in zip(names, torch.split(whole, rows), strict=True):
            self._fill(part, name)
        return whole

    @abstractmethod
    def _fill(self, part: Tensor, name: str) -> None:
        """Write the named tensor into `part`, which is contiguous and of its shape."""

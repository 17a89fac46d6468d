"""Random weights for benchmarks: what a config.json describes, without a file to read."""

import hashlib

import torch
from torch import Tensor

from engine.tensor_source import Shapes, TensorSource
from kernels.philox import philox4x32

# Counters in one piece, 8 numbers each: on a CPU what stays in its caches, on a GPU what hides the launches.
_PIECE = {"cpu": 1 << 14, "cuda": 1 << 21}


class RandomSource(TensorSource):
    """Matrices and biases uniform with standard deviation 1 / sqrt(inputs), norms 1.

    A layer then keeps the size of what it reads, and logits are spread by about 1, whatever the model's width. Numbers
    depend on the seed, the tensor's name and the element's place alone: they are the same on every device.
    """

    def __init__(self, shapes: Shapes, device: torch.device, seed: int) -> None:
        super().__init__(shapes, device)
        self._seed = seed

    def _fill(self, part: Tensor, name: str) -> None:
        if name.endswith("norm.weight"):
            part.fill_(1.0)
            return
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        k0, k1 = (torch.tensor(int.from_bytes(word, "little"), device=self.device) for word in (digest[:4], digest[4:]))
        bound = (3.0 / part.shape[-1]) ** 0.5
        piece = _PIECE[self.device.type]
        for index, numbers in enumerate(torch.split(part.view(-1), 8 * piece)):
            counters = torch.arange(-(-numbers.numel() // 8), device=self.device) + index * piece
            numbers.copy_(_uniform(counters, k0, k1)[: numbers.numel()] * bound)


def _uniform(counters: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """[8 * counters] float32 in (-1, 1), in steps of 2**-15: exact, so no device rounds them in its own way."""
    zero = torch.zeros_like(counters)
    words = torch.stack(philox4x32(counters, zero, zero, zero, k0, k1), 1)  # [counters, 4], 32 bits each
    halves = torch.stack((words & 0xFFFF, words >> 16), 2)  # [counters, 4, 2]
    return (halves.view(-1).float() + 0.5) * 2.0**-15 - 1.0

"""What a launched step gives, on its way to the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.event_wait import wait_for
from engine.logprob_reading import LogprobReading


@dataclass(frozen=True)
class Reading:
    """Sampled ids, and log-probabilities where they are wanted: there when `arrived` has happened, or at once."""

    tokens: Tensor  # [rows] int64, pinned
    rows: list[int]
    logprobs: list[LogprobReading]
    arrived: torch.cuda.Event | None

    def ids(self) -> list[int]:
        """Wait for the step; the id of each of `rows`. Log-probabilities are added to their sequences.

        Raises `WorkerLost` where the device does not finish it.
        """
        self.wait()
        for logprobs in self.logprobs:
            logprobs.deliver()
        tokens = self.tokens.tolist()
        return [tokens[row] for row in self.rows]

    def wait(self) -> None:
        if self.arrived is not None:
            wait_for(self.arrived)

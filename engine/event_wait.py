"""Waiting for a GPU, but not for ever."""

import time

import torch

from protos.errors import WorkerLost

_MOST_S = 30.0  # a step takes milliseconds, one with a long prompt a second
_LOOK_S = 200e-6  # between looks, each some 20 us of CPU time; CUDA itself cannot wait with a deadline


def wait_for(event: torch.cuda.Event) -> None:
    """Wait until all that was queued before the event is done. Raises `WorkerLost` where the GPU does not get there."""
    deadline = time.monotonic() + _MOST_S
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline:
            raise WorkerLost(f"the GPU has not finished what it was given {_MOST_S:.0f} s ago")
        time.sleep(_LOOK_S)

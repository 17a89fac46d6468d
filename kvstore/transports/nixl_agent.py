"""NIXL as the store needs it: memory that peers can read, and reads of theirs.

The package `nixl` (the extra of the same name) is imported at the first use.
"""

import importlib
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.transports.base import STAGE
from protos import errors

_POLL_S = 50e-6


def unavailable() -> str:
    """Why NIXL cannot be used here; empty where it can."""
    try:
        _nixl()
    except ImportError as error:
        return f"the package nixl cannot be imported ({error}): pip install 'diptych[nixl]'"
    return ""


@dataclass(frozen=True)
class Blocks:
    """`count` blocks of `size` bytes, one behind the other from `address` on; on a GPU where `device` is one."""

    address: int
    size: int
    count: int
    device: int | None = None


class NixlAgent:
    """One end of NIXL. Every failure is `WorkerLost`: it came from the peer, or from the way to it."""

    def __init__(self) -> None:
        nixl = _nixl()
        config = nixl.nixl_agent_config(backends=["UCX"])
        self._agent: Any = _call(nixl.nixl_agent, uuid.uuid4().hex, config)
        self._prepared: list[Any] = []

    def register(self, address: int, size: int, device: int | None = None) -> None:
        """Let this memory be read, or read into, until `close`."""
        _call(self._agent.register_memory, [(address, size, device or 0, "")], _kind(device))

    def metadata(self) -> bytes:
        """What a peer needs to read what is registered so far."""
        return bytes(_call(self._agent.get_agent_metadata))

    def meet(self, metadata: bytes) -> str:
        """The name of the peer whose metadata that is."""
        name: str | bytes = _call(self._agent.add_remote_agent, metadata)
        return name if isinstance(name, str) else name.decode()

    def prepare(self, blocks: Blocks, peer: str = "") -> int:
        """Blocks of this end, or of a peer's; returns their name for `read`."""
        row = (blocks.address, blocks.size, blocks.device or 0, blocks.size, blocks.count)
        rows = np.array([row], np.uint64)  # address, bytes, device, stride, count
        self._prepared.append(_call(self._agent.prep_xfer_dlist, peer, rows, _kind(blocks.device)))
        return len(self._prepared) - 1

    def read(self, into: int, here: Sequence[int], source: int, there: Sequence[int], deadline: float) -> None:
        """Copy blocks of a peer by their numbers; returns when all have arrived.

        Where this raises, bytes may go on arriving until the agent is closed.
        """
        if self._agent is None:
            raise errors.WorkerLost("the connection to the owner is closed", stage=STAGE)
        if time.monotonic() >= deadline:
            raise errors.WorkerLost(f"{len(there)} blocks were not read in time", stage=STAGE)
        ends = self._prepared[into], list(here), self._prepared[source], list(there)
        transfer = _call(self._agent.make_prepped_xfer, "READ", *ends)
        try:
            state = _call(self._agent.transfer, transfer)
            while state == "PROC" and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                state = _call(self._agent.check_xfer_state, transfer)
            if state != "DONE":
                why = "were not read in time" if state == "PROC" else "cannot be read any more"
                raise errors.WorkerLost(f"{len(there)} blocks {why}", stage=STAGE)
        finally:
            with suppress(Exception):  # what is still under way ends with the agent
                transfer.release()
            # An exception's traceback keeps this frame, and NIXL ends only with the last reference to any part of it.
            del transfer, ends

    def close(self) -> None:
        """Let go of the memory and of every peer: when this returns nothing arrives any more. May be called again."""
        self._prepared.clear()
        self._agent = None


def _kind(device: int | None) -> str:
    return "DRAM" if device is None else "VRAM"


def _nixl() -> Any:
    nixl = importlib.import_module("nixl")
    log = logging.getLogger("nixl")
    log.handlers.clear()  # its own one writes to standard output
    log.propagate = True
    log.setLevel(logging.WARNING)
    return nixl


def _call(function: Callable[..., Any], *arguments: object) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # its exceptions have no base of their own
        reason = f"{type(error).__name__}: {error}"
    del function, arguments  # nor is the error chained: see `read`
    raise errors.WorkerLost(f"NIXL failed with {reason}", stage=STAGE)

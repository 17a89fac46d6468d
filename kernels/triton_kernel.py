"""Triton kernels that cost nothing until one is launched."""

from collections.abc import Callable
from threading import Lock
from typing import Any

_lock = Lock()


class TritonKernel:
    """A decorator: a Triton kernel that is jitted, and Triton imported, at its first launch.

    Importing Triton takes 0.8 s, and some platforms that serve on CPU have no build of it. A kernel's module sees
    the language as `tl`: it imports that under TYPE_CHECKING, and annotations from __future__.
    """

    def __init__(self, body: Callable[..., None]) -> None:
        self._body = body
        self._jitted: Any = None

    @property
    def jitted(self) -> Any:
        """What `triton.jit` makes of the body, the same for all threads."""
        with _lock:
            if self._jitted is None:
                import triton
                import triton.language

                self._body.__globals__["tl"] = triton.language
                self._jitted = triton.jit(self._body)
            return self._jitted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """`kernel[grid](*arguments)` launches it, as in Triton."""
        launcher: Callable[..., Any] = self.jitted[grid]
        return launcher


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def launch_options(overlap: bool) -> dict[str, object]:
    """What makes a kernel with the constant OVERLAP start while the previous kernel of the stream still runs, or not.

    Programmatic dependent launch, of GPUs from Hopper on. The kernel lets its own successor start at once, and must
    call `gdc_wait` before it reads or writes what an earlier kernel may be writing or reading.
    """
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}

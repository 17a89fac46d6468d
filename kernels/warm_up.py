"""The first run of what will be recorded: its kernels are compiled and loaded, several at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from triton import AsyncCompileMode

_CALLERS = 6  # threads that launch; each has scratch memory of cuBLAS's of its own
_COMPILERS = 12  # threads that compile what the others wait for


def warm_up(calls: Sequence[Callable[[], None]]) -> None:
    """Make all the calls, side by side. Raises what one of them raises, when the others have ended.

    Most of a first start is compiling, and most of that leaves Python to other threads. A kernel that several calls
    wait for is compiled once.
    """
    if not calls:
        return
    with (
        ThreadPoolExecutor(_COMPILERS) as compilers,
        _compile_in(compilers),
        ThreadPoolExecutor(_CALLERS) as callers,
    ):
        made = [callers.submit(copy_context().run, torch.inference_mode()(call)) for call in calls]
    for call in made:
        call.result()
    if torch.cuda.is_available():
        # This thread's: it cannot be made while the thread records.
        torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]


def _compile_in(compilers: ThreadPoolExecutor) -> "AsyncCompileMode":
    """Triton's mode for compiling in other threads, made safe for callers that ask for the same kernel at once."""
    from triton import AsyncCompileMode

    class OneEach(AsyncCompileMode):  # type: ignore[misc]  # Triton has no types
        def submit(self, *arguments: Any) -> Any:
            with lock:  # between its look for the kernel and its note of it, another thread would compile it as well
                return super().submit(*arguments)

    lock = Lock()
    return OneEach(compilers)

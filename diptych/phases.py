"""Showing what a slow command does: a line for each phase that is done, and a spinner for the one that runs."""

import time
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.status import Status


class Phases:
    """A context manager. `show(phase, detail)` may be called as often as one likes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = Status("", console=console)
        self._phase = ""
        self._since = 0.0

    def show(self, phase: str, detail: str) -> None:
        """Say what is being done now."""
        if phase != self._phase:
            self._finish()
            self._phase, self._since = phase, time.monotonic()
        self._status.update(f"{phase} [dim]{escape(detail)}[/dim]")

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._status.stop()

    def _finish(self) -> None:
        if self._phase:
            took = time.monotonic() - self._since
            self._console.print(f"[green]✓[/green] {self._phase} [dim]{took:.1f} s[/dim]", highlight=False)

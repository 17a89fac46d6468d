"""`diptych pull`, `diptych demo` and `diptych version`."""

from typing import Annotated

import typer
from rich.console import Console

from diptych.phases import Phases
from diptych.version import __version__


def pull(model: Annotated[str, typer.Argument(help="Hub id, directory, .gguf file or the demo model's name.")]) -> None:
    """Fetch a model and make it ready, so that `up` starts at once."""
    from engine import hub

    with Phases(Console(stderr=True)) as phases:
        phases.show("model", model)
        resolved = hub.resolve(model, lambda text: phases.show("model", text))
    print(f"{resolved.model_id} is ready in {resolved.path}")


def demo() -> None:
    """See a real model answer through router, prefill, store and decode, and where the time went."""
    from diptych.demo import run

    run()


def version() -> None:
    """Print the version."""
    print(__version__)

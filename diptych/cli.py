"""The `diptych` command. What is slow to import is imported by the commands that need it."""

import os
import sys
import traceback

import typer

from diptych.commands import doctor, generate, models, operate, replay, up
from diptych.exit_codes import INTERRUPTED, OTHER, SETUP, exit_code
from protos import errors

_HELP = """Serve large language models on two pools that scale apart: prefill and decode.

Exit codes: 0 done, 2 wrong command line or request, 3 wrong setup, 4 unavailable or overloaded, 5 deadline passed,
130 interrupted, 1 anything else. DIPTYCH_DEBUG=1 shows tracebacks.
"""

app = typer.Typer(
    help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.command()(up.up)
app.command()(up.down)
app.command()(operate.status)
app.command()(operate.scale)
app.command()(doctor.doctor)
app.command()(generate.generate)
app.command()(replay.replay)
app.command()(models.pull)
app.command()(models.demo)
app.command()(models.version)


def main() -> None:
    """Run the command line and exit with its code. Errors are told in words; none is a traceback."""
    try:
        app()
    except errors.DiptychError as error:
        _say(error, error.message)
        sys.exit(exit_code(error))
    except ModuleNotFoundError as error:
        _say(error, f"{error.name} is not installed: this is a client; to serve, pip install 'diptych[serve]'")
        sys.exit(SETUP)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        _say(error, f"{type(error).__name__}: {error}\nThis is a bug; DIPTYCH_DEBUG=1 shows where.")
        sys.exit(OTHER)


def _say(error: BaseException, text: str) -> None:
    if os.environ.get("DIPTYCH_DEBUG"):
        traceback.print_exception(error)
    print(f"diptych: {text}", file=sys.stderr)

"""Diptych's front door: the command line and the Python client."""

from typing import TYPE_CHECKING, Any

from diptych.version import __version__

if TYPE_CHECKING:
    from diptych.client import Client

__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    """`from diptych import Client`, with grpc imported only when somebody asks for it."""
    if name == "Client":
        from diptych.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

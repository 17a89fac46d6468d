"""Diptych's front door: the command line and the Python client."""

from diptych.version import __version__

__all__ = ["__version__"]

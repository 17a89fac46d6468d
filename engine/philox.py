"""Philox 4x32-10 by the engine's name: the kernels draw from it too."""

from kernels.philox import philox4x32, uniform

__all__ = ["philox4x32", "uniform"]

"""Attention and step kernels: Triton beside a plain-torch twin (the CPU backend and the oracle).

This package imports nothing here: other projects probe for a distribution of the same name.
"""

__version__ = "0.1.0"

"""Continues sequences: reserve, pull pages, join the batch, stream."""

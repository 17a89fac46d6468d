"""Computes prompts and goes on with them: both phases in one engine, no hand-over."""

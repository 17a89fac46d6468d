"""Computes prompts: admit, chunk, run, publish pages, first token out."""

"""The two ways in which a model may narrow its attention, and what values they can have."""

import math


def check_options(window: int, soft_cap: float) -> None:
    """Raises ValueError naming the option that is out of range.

    window: each query sees so many of the newest keys up to and including its own; 0: all of them.
    soft_cap: a score s counts as soft_cap * tanh(s / soft_cap), after scaling (Gemma 2); 0: as it is.
    """
    if window < 0:
        raise ValueError(f"window must be 0 or a number of keys, not {window}")
    if not math.isfinite(soft_cap) or soft_cap < 0:
        raise ValueError(f"soft_cap must be 0 or a positive finite number, not {soft_cap}")

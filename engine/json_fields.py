"""Reading JSON that somebody else wrote: files, and fields of which each is checked once. No torch."""

import json
import math
from pathlib import Path
from typing import Any

from protos.errors import ModelUnusable


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's directory. Raises `ModelUnusable`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelUnusable(
            f"{path} is missing: a model directory holds config.json, tokenizer.json and *.safetensors", stage="load"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{path} cannot be read ({error}): fetch the model's files again", stage="load") from error
    if not isinstance(value, dict):
        raise ModelUnusable(f"{path} holds no JSON object: fetch the model's files again", stage="load")
    return value


def count(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    """A whole number above 0. A missing or null one is the default, or a KeyError; others raise ValueError."""
    value = raw.get(name)
    if value is None:
        if default is None:
            raise KeyError(name)
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, not a whole number above 0")
    return value


def positive(raw: dict[str, Any], name: str, default: float | None = None) -> float:
    """A finite number above 0. A missing or null one is the default, or a KeyError; others raise ValueError."""
    value = raw.get(name)
    if value is None:
        if default is None:
            raise KeyError(name)
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, not a number above 0")
    return float(value)


def flag(raw: dict[str, Any], name: str, default: bool) -> bool:
    """true or false. A missing or null one is the default; others raise ValueError."""
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, not true or false")
    return value

"""What transformers says about a model directory: the oracle for logits, greedy answers and perplexity.

Transformers is a development dependency; serving does not need it.
"""

import functools
import importlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache(maxsize=1)
def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a directory, as transformers loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations are not ours
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.eval()
    return model


@torch.inference_mode()
def logits(path: Path, ids: Sequence[int]) -> Tensor:
    """[len(ids), vocab] float32."""
    out: Tensor = load(path)(torch.tensor([list(ids)])).logits[0]
    return out


def greedy_choices(path: Path, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """The likeliest id after the prompt and after each but the last of the answer's ids. An answer that equals its
    choices is the model's greedy answer, each id by the ids before it; one pass tells, where generating takes many."""
    return _choices(path, tuple(prompt), tuple(answer))


@functools.lru_cache(maxsize=64)
@torch.inference_mode()
def _choices(path: Path, prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt + answer[:-1]])
    out: list[int] = load(path)(ids, logits_to_keep=len(answer)).logits[0].argmax(-1).tolist()
    return out


def perplexity(logits: Tensor, ids: Sequence[int]) -> float:
    """exp of the mean loss of ids[1:], from the logits [len(ids), vocab] of all positions."""
    loss = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(list(ids[1:])))
    return math.exp(loss.item())

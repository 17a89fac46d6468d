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
    model.generation_config.eos_token_id = None  # an answer has the length that is asked for
    return model


@torch.inference_mode()
def logits(path: Path, ids: Sequence[int]) -> Tensor:
    """[len(ids), vocab] float32."""
    out: Tensor = load(path)(torch.tensor([list(ids)])).logits[0]
    return out


@torch.inference_mode()
def greedy_tokens(path: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The `count` ids after each prompt, whatever they are: an end of sequence does not end it."""
    return [_answer(load(path), list(prompt), count) for prompt in prompts]


def _answer(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in answer[0, len(prompt) :]]


def perplexity(logits: Tensor, ids: Sequence[int]) -> float:
    """exp of the mean loss of ids[1:], from the logits [len(ids), vocab] of all positions."""
    loss = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(list(ids[1:])))
    return math.exp(loss.item())

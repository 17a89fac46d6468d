"""How each row of a step is sampled: tensors on the device, which a captured graph reads anew at every replay."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kernels.sample_scale import ID_BITS, IN_PROMPT, MAX_COUNT

_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "repetition_penalty": torch.float32,
    "frequency_penalty": torch.float32,
    "presence_penalty": torch.float32,
    "seeds": torch.int64,
    "positions": torch.int64,
    "bias_ids": torch.int32,
    "bias": torch.float32,
    "bias_until": torch.int32,
    "counts": torch.int16,
}
_NEUTRAL = {"top_p": 1, "repetition_penalty": 1, "bias_ids": -1, "bias_until": 2**31 - 1}  # the others: 0


@dataclass(frozen=True)
class SamplingRows:
    """One entry a row. `neutral` makes rows that are greedy and change nothing; write into the tensors from there.

    A logit is changed in this order: bias; repetition penalty, for tokens of prompt or answer (l / r where l > 0, else
    l * r); less frequency_penalty for each time that the answer has the token and presence_penalty where it has it.
    Then temperature; the top_k most probable tokens; of these the fewest that reach top_p of their mass; of these the
    ones at least min_p times as probable as the first. Of equals, lower ids go first.
    """

    temperature: Tensor  # [rows] float32; below 1e-5 the most probable token is taken
    top_k: Tensor  # [rows] int32; 0: off
    top_p: Tensor  # [rows] float32; 1: off
    min_p: Tensor  # [rows] float32; 0: off
    repetition_penalty: Tensor  # [rows] float32; 1: off
    frequency_penalty: Tensor  # [rows] float32; 0: off
    presence_penalty: Tensor  # [rows] float32; 0: off
    seeds: Tensor  # [rows] int64, for 64 bits without a sign
    positions: Tensor  # [rows] int64: where in its sequence the new token will stand
    # An entry adds `bias` to the logit of token `bias_ids` while the position is below `bias_until`. Of a token's
    # entries all but one must be -inf. So bans, and the end tokens of an answer with a least length, are entries too.
    bias_ids: Tensor  # [rows, entries] int32; -1: unused
    bias: Tensor  # [rows, entries] float32
    bias_until: Tensor  # [rows, entries] int32
    # For the penalties: how often the answer has each token, and in bit 14 whether the prompt has it. Sampling adds
    # its tokens. None: no row has penalties.
    counts: Tensor | None  # [rows, vocab] int16

    @classmethod
    def neutral(cls, rows: int, vocab: int, entries: int, device: torch.device, *, counts: bool) -> "SamplingRows":
        """Rows that take the most probable token. `entries`: of the bias; `counts`: whether rows may have penalties."""
        shapes = _shapes(rows, vocab, entries)
        tensors: dict[str, Any] = {
            name: torch.full(shapes[name], _NEUTRAL.get(name, 0), dtype=dtype, device=device)
            for name, dtype in _DTYPES.items()
            if name != "counts" or counts
        }
        counted = tensors.pop("counts", None)
        return cls(**tensors, counts=counted)

    def first(self, rows: int) -> "SamplingRows":
        """Views of the first so many rows: what a graph of a smaller batch reads."""
        tensors = {field.name: getattr(self, field.name)[:rows] for field in fields(self) if field.name != "counts"}
        return SamplingRows(**tensors, counts=None if self.counts is None else self.counts[:rows])

    def check(self, logits: Tensor) -> None:
        """Raises ValueError naming the argument that is wrong, or does not fit logits [rows, vocab]."""
        if logits.ndim != 2 or logits.stride(1) != 1 or logits.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"logits must be float32 or bfloat16 rows, not {logits.dtype} {tuple(logits.shape)}")
        rows, vocab = logits.shape
        if not 0 < vocab <= 2**ID_BITS:
            raise ValueError(f"logits of {vocab} tokens: 1 to {2**ID_BITS} are wanted")
        shapes = _shapes(rows, vocab, self.bias_ids.shape[-1])
        for name, dtype in _DTYPES.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tensor.shape != shapes[name] or tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous {dtype} {shapes[name]}, not {tensor.dtype} {tuple(tensor.shape)}"
                )
            if tensor.device != logits.device:
                raise ValueError(f"{name} is on {tensor.device}, logits on {logits.device}")


def _shapes(rows: int, vocab: int, entries: int) -> dict[str, tuple[int, ...]]:
    return {
        name: (rows, vocab) if name == "counts" else (rows, entries) if name.startswith("bias") else (rows,)
        for name in _DTYPES
    }


def count_tokens(counts: Tensor, prompt: Tensor, answer: Tensor) -> None:
    """Set a row of `SamplingRows.counts` [vocab] for a sequence of these tokens, [n] int64 each, on its device."""
    times = torch.zeros(counts.shape, dtype=torch.int32, device=counts.device)
    times.index_add_(0, answer, torch.ones_like(answer, dtype=torch.int32))
    seen = torch.zeros_like(counts).index_fill_(0, prompt, IN_PROMPT)
    counts.copy_(times.clamp_(max=MAX_COUNT).to(torch.int16) | seen)

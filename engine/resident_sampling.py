"""How the rows of the resident batch are sampled, kept on the device beside them."""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.logit_transforms import completing
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from kernels.sample import sample
from kernels.sample_rows import SamplingRows, count_tokens
from kernels.upload import upload

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_ENTRIES = 2048  # of a row's bias: as many as a request can ask for, its end tokens included
_ALWAYS = 2**31 - 1
Entry = tuple[int, float, int]  # token id, what is added to its logit, at positions below this


class Kind(IntEnum):
    """What the sampling of a step must be able to do."""

    GREEDY = 0  # no row is drawn, no logit is changed
    DRAWN = 1  # no logit is changed
    EDITED = 2

    @staticmethod
    def of(params: SamplingParams) -> "Kind":
        if params.changes_logits:
            return Kind.EDITED
        return Kind.GREEDY if params.greedy else Kind.DRAWN


class ResidentSampling:
    """One entry a row, as `SamplingRows` has them. What rows without a sequence hold does not matter."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        neutral = SamplingRows.neutral(rows, vocab, _ENTRIES, device, counts=True)
        # What is written and moved together lies together.
        self._floats = torch.stack([getattr(neutral, name) for name in _FLOATS])  # [settings, rows]
        self._bias = torch.stack([neutral.bias_ids, neutral.bias.view(torch.int32), neutral.bias_until])
        ids, bias, until = self._bias.unbind()
        floats = dict(zip(_FLOATS, self._floats.unbind(), strict=True))
        self._rows = replace(neutral, **floats, bias_ids=ids, bias=bias.view(torch.float32), bias_until=until)
        self._new: dict[int, Sequence] = {}
        self._entries: dict[int, list[Entry]] = {}  # of rows whose bias is to be sent
        self._biased: set[int] = set()

    def fill(self, row: int, sequence: Sequence) -> None:
        """Seat a sequence."""
        self._new[row] = sequence
        self.edit(row, sequence, sequence.tokens)

    def edit(self, row: int, sequence: Sequence, tokens: SequenceOf[int]) -> None:
        """Set a row's bias and bans as they are after `tokens`."""
        entries = _entries(sequence, tokens, self._vocab)
        if entries or row in self._biased:
            self._entries[row] = entries

    def move(self, moves: SequenceOf[tuple[int, int]], rows: Tensor) -> None:
        """Give the contents of rows to others, at once: (from, to), and the same on the device, [2, n] int64."""
        self._biased = self._biased - {to for _, to in moves} | {to for source, to in moves if source in self._biased}
        assert self._rows.counts is not None
        for per_row in (self._rows.top_k, self._rows.seeds, self._rows.counts):
            per_row[rows[1]] = per_row[rows[0]]
        for per_setting in (self._floats, self._bias):
            per_setting[:, rows[1]] = per_setting[:, rows[0]]

    def flush(self) -> None:
        """Send what has changed, in the order of the current stream."""
        if self._new:
            self._send_settings()
            self._new.clear()
        if self._entries:
            self._send_bias()
            self._entries.clear()

    def first(self, rows: int, kind: Kind) -> SamplingRows:
        """Views of the first so many rows, for a step of this kind: a graph reads them anew at every replay."""
        views = self._rows.first(rows)
        if kind is Kind.EDITED:
            return views
        ids, bias, until = (tensor[:, :0] for tensor in (views.bias_ids, views.bias, views.bias_until))
        return replace(views, bias_ids=ids, bias=bias, bias_until=until, counts=None)

    def sample(self, logits: Tensor, rows: Tensor, positions: Tensor, kind: Kind) -> Tensor:
        """logits [n, vocab] -> ids [n] int64, for rows [n] int64 whose new tokens stand at positions [n] int64."""
        chosen = self.first(len(rows), kind)
        if kind is not Kind.GREEDY:
            chosen = _pick(self.first(len(self._rows.top_k), kind), rows)
        ids = sample(logits, replace(chosen, positions=positions), greedy=kind is Kind.GREEDY)
        if chosen.counts is not None and self._rows.counts is not None:
            self._rows.counts[rows] = chosen.counts
        return ids

    def _send_settings(self) -> None:
        params = [sequence.sampling for sequence in self._new.values()]
        arrays = [
            np.array(list(self._new)),
            np.array([[getattr(p, name) for p in params] for name in _FLOATS], dtype=np.float32),
            np.array([p.top_k for p in params], dtype=np.int32),
            np.array([p.seed for p in params], dtype=np.uint64).view(np.int64),
        ]
        rows, floats, top_k, seeds = upload(arrays, self._device)
        self._floats[:, rows], self._rows.top_k[rows], self._rows.seeds[rows] = floats, top_k, seeds
        for row, sequence in self._new.items():
            if sequence.sampling.has_penalties:
                self._count(row, sequence)

    def _count(self, row: int, sequence: Sequence) -> None:
        assert self._rows.counts is not None
        tokens, answer_at = np.array(sequence.tokens), sequence.prompt_len
        count_tokens(self._rows.counts[row], *upload([tokens[:answer_at], tokens[answer_at:]], self._device))

    def _send_bias(self) -> None:
        bias = np.empty((3, len(self._entries), _ENTRIES), dtype=np.int32)
        bias[0], bias[1], bias[2] = -1, 0, _ALWAYS
        for index, entries in enumerate(self._entries.values()):
            if entries:
                ids, added, until = zip(*entries, strict=True)
                bias[0, index, : len(ids)], bias[2, index, : len(ids)] = ids, until
                bias[1, index, : len(ids)] = np.array(added, dtype=np.float32).view(np.int32)
        rows, sent = upload([np.array(list(self._entries)), bias], self._device)
        self._bias[:, rows] = sent
        self._biased |= self._entries.keys()
        self._biased -= {row for row, entries in self._entries.items() if not entries}


def _entries(sequence: Sequence, tokens: SequenceOf[int], vocab: int) -> list[Entry]:
    """What is added to logits after `tokens`: bias, bans, and no end before the least length."""
    params = sequence.sampling
    entries: list[Entry] = [(token, bias, _ALWAYS) for token, bias in params.logit_bias]
    if params.bad_tokens:
        banned = set(completing(params.bad_tokens, tokens))
        entries += [(token, -np.inf, _ALWAYS) for token in banned]
    if params.min_tokens:
        entries += [(token, -np.inf, sequence.prompt_len + params.min_tokens) for token in sequence.end_ids]
    return [entry for entry in entries if entry[0] < vocab]


def _pick(rows: SamplingRows, chosen: Tensor) -> SamplingRows:
    """Copies of the chosen rows."""
    tensors: dict[str, Any] = {name: getattr(rows, name) for name in rows.__dataclass_fields__}
    picked: dict[str, Any] = {name: None if tensor is None else tensor[chosen] for name, tensor in tensors.items()}
    return SamplingRows(**picked)

"""Log-probabilities on their way from the device to the sequences that asked for them."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from torch import Tensor

from engine.sequence import Sequence
from kernels.sample_log_probs import log_probs
from kernels.upload import download
from protos.v1.common_pb2 import TokenLogprobs


@dataclass(frozen=True)
class Wanted:
    """Whose one row's log-probabilities are, where they go, and of how many of the likeliest tokens besides its own."""

    sequence: Sequence
    into: list[TokenLogprobs]
    top: int


class LogprobReading:
    """Those of some rows of one step: sent when this is made, and there once the step is done."""

    def __init__(self, logits: Tensor, ids: Tensor, wanted: SequenceOf[Wanted]) -> None:
        """logits [rows, vocab], as the model gives them; ids [rows] int64: each row's token."""
        self._wanted = wanted
        top = min(max(want.top for want in wanted), logits.shape[1])
        found, top_ids, top_found = log_probs(logits, ids, top)
        self._ids, self._found, self._top_ids, self._top_found = map(download, (ids, found, top_ids, top_found))

    def deliver(self) -> None:
        """Give them to the sequences. The step must be done."""
        rows = zip(
            self._wanted,
            self._ids.tolist(),
            self._found.tolist(),
            self._top_ids.tolist(),
            self._top_found.tolist(),
            strict=True,
        )
        for want, token_id, found, top_ids, top_found in rows:
            if want.sequence.dropped:  # it ended in the step before: this row is one too many
                continue
            want.into.append(
                TokenLogprobs(
                    token_id=token_id,
                    logprob=found,
                    top_ids=top_ids[: want.top],
                    top_logprobs=top_found[: want.top],
                )
            )

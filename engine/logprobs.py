"""Log-probabilities of tokens, as the model alone gives them."""

from collections.abc import Sequence

from torch import Tensor

from engine.logit_transforms import ids_of_largest
from protos.v1.common_pb2 import TokenLogprobs


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """For each row of logits [rows, vocab], that of its token and of the `top` most probable ones, lowest ids first
    among equals. The logits are those of the model, float32 and unchanged.
    """
    # One row at a time, as in sampling: a row's logits stay in the cache.
    return [_of_row(row, token_id, top) for row, token_id in zip(logits, token_ids, strict=True)]


def _of_row(logits: Tensor, token_id: int, top: int) -> TokenLogprobs:
    logprobs = logits.log_softmax(-1)  # [vocab]
    found = TokenLogprobs(token_id=token_id, logprob=float(logprobs[token_id]))
    if top:
        top = min(top, logits.shape[0])
        ids = ids_of_largest(logits, logits.topk(top).values[-1], top)
        ids = ids[logits[ids].sort(descending=True, stable=True).indices]
        found.top_ids.extend(ids.tolist())
        found.top_logprobs.extend(logprobs[ids].tolist())
    return found

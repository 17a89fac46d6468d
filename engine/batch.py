"""What one forward pass computes. An explicit argument: two engines fit in one process."""

from dataclasses import dataclass

from torch import Tensor

from kernels.attention import AttentionPlan, DecodePlan, PrefillPlan


@dataclass(frozen=True)
class ForwardBatch:
    """Tokens of several sequences, packed. Decode rows (one token each) come first, prefill chunks after them."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, position in the sequence, from 0
    slots: Tensor  # [tokens] int64: page * page_size + offset, where the token's K and V are written
    logit_rows: Tensor | None  # [rows] int64: which tokens' logits are wanted; None: all
    plan: AttentionPlan | DecodePlan | PrefillPlan

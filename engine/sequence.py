"""One sequence in one engine."""

from dataclasses import dataclass, field
from enum import Enum

from engine.sampling_params import SamplingParams
from kvstore.keys import PageKey
from kvstore.pool import Credit, PageId
from kvstore.quota import Quota
from protos.v1.common_pb2 import TokenLogprobs


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(eq=False)
class Sequence:
    """Tokens, and the pages that hold their K and V.

    `tokens` is the prompt and what was sampled after it, as far as the host has read it; `unread` tokens more are
    sampled or will be by what is launched. Of all these the first `computed` have K and V in `pages`, or will have.
    The first `sealed` pages are sealed and this sequence reads them; the others it writes.
    """

    request_id: str
    tokens: list[int]
    prompt_len: int
    max_len: int  # ends with LENGTH when it has this many tokens
    sampling: SamplingParams
    end_ids: frozenset[int]
    keys: list[PageKey]  # of the full pages, as far as they are known
    root: PageKey  # stands before the first key: the tenant's
    quota: Quota | None = None  # of the pool, for its tenant; None: no bound
    pages: list[PageId] = field(default_factory=list)
    credit: Credit | None = None
    computed: int = 0
    unread: int = 0
    under_way: int = 0  # chunks that are launched and not read
    sealed: int = 0
    scored: int = 0  # prompt tokens whose successors' log-probabilities are told or under way, where they are wanted
    order: int = 0  # of arrival in the engine
    share: float = 0.0  # of all answers as long as its own, how many are taken to end before it
    expected_len: int = 0  # tokens at its end, as far as one can know
    fetchable: int = 0  # leading pages that can be had from elsewhere; 0 once they were asked for
    awaited: PageKey | None = None  # while it waits to be admitted: a page that another sequence is about to seal
    prefix_pages: int = 0  # pages that were found when it was admitted, not computed
    dropped: bool = False  # what is still computed for it is for nobody
    # What the runner has found and nobody has taken yet, where `sampling` asks for it.
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of sampled tokens
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's, from its second on

    @property
    def pending(self) -> int:
        """Tokens whose K and V are still to be computed; the last one of all never is."""
        return min(len(self.tokens) + self.unread, self.max_len - 1) - self.computed

    def append(self, token: int) -> Finish | None:
        """Take a sampled token; says whether it was the last."""
        self.tokens.append(token)
        if token in self.end_ids:
            return Finish.STOP
        return Finish.LENGTH if len(self.tokens) >= self.max_len else None

"""Prompts that are still growing, so that a store uses and lets go of their pages as their worker did: tail first."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvstore.keys import PageKey
from kvstore.page_state import PageId


@dataclass
class Chain:
    """All pages of a prompt from its first on, as far as they are known; `held` are those that it reads."""

    keys: list[PageKey] = field(default_factory=list)
    held: list[PageId] = field(default_factory=list)
    grown: float = 0.0  # when the last page came, monotonic seconds


class OpenChains:
    """Chains by the key of their last page, the one that grew longest ago first.

    Pages come one by one, parents first, and a policy must see children let go before their parents. So a page that
    came stays read until nothing has followed it for a while, and then its whole prompt is let go at once. That counts
    as one use for each of its pages, whatever the number of chunks in which the worker computed it.
    """

    def __init__(self, quiet_s: float) -> None:
        self._quiet_s = quiet_s
        self._by_last: OrderedDict[PageKey, Chain] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_last)

    def take(self, last: PageKey | None) -> Chain | None:
        """The chain that ends with this page, which is not kept here any more."""
        return None if last is None else self._by_last.pop(last, None)

    def put(self, chain: Chain, now: float) -> None:
        """Keep a chain whose last page has just come. There must be none that ends with the same page."""
        chain.grown = now
        self._by_last[chain.keys[-1]] = chain

    def pop_quiet(self, now: float) -> Iterator[Chain]:
        """Those that have not grown for long enough, which are not kept here any more."""
        while self._by_last and now - self._first().grown >= self._quiet_s:
            yield self.pop_first()

    def pop_first(self) -> Chain:
        """The one that grew longest ago. There must be one."""
        return self._by_last.popitem(last=False)[1]

    def _first(self) -> Chain:
        return next(iter(self._by_last.values()))

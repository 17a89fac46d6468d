"""Which tokens are computed next, and which pages hold them. Pure bookkeeping: no torch, no clock."""

import logging
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import count as numbers

from engine.answer_lengths import AnswerLengths, Expectation
from engine.config import EngineConfig
from engine.filling import Filling
from engine.room import Room
from engine.sequence import Sequence
from kvstore.keys import PageKey, next_key, pack_tokens
from kvstore.lineage import Lineage
from kvstore.pool import OutOfPages, PagePool
from kvstore.quota import OverQuota, Quota
from protos.errors import Overloaded

log = logging.getLogger(__name__)


@dataclass(slots=True)  # frozen, it would take three times as long to make, for each row of each step
class Chunk:
    """The next tokens of a sequence, from its `start` on and up to its `end`."""

    sequence: Sequence
    start: int
    end: int
    is_last: bool  # a token is sampled after it

    @property
    def count(self) -> int:
        return self.end - self.start

    @property
    def is_row(self) -> bool:
        """Whether it is a decode row: one token in, one token out."""
        return self.is_last and self.count == 1

    @property
    def scored(self) -> int:
        """How many of its tokens, from the first on, say the log-probability of a prompt token that is asked for."""
        sequence = self.sequence
        if sequence.sampling.prompt_logprobs is None or self.start < sequence.scored:  # `schedule` cuts at `scored`
            return 0
        return max(0, min(self.count, sequence.prompt_len - 1 - self.start))


class Scheduler:
    """Continuous batching: every step takes decode rows first, then prompt chunks in order of arrival.

    `on_seal` hears of every full page that becomes reusable.
    """

    def __init__(
        self,
        pool: PagePool,
        config: EngineConfig,
        on_seal: Callable[[Lineage], None] = lambda page: None,
        lengths: Expectation | None = None,
    ) -> None:
        self.pool = pool
        self.config = config
        self._on_seal = on_seal
        self._room = Room(pool, config.page_size, lengths or AnswerLengths())
        self._orders = numbers(1)
        self.waiting: deque[Sequence] = deque()  # in order of arrival
        self.arriving: list[Sequence] = []  # admitted; pages that somebody else holds are still on their way to it
        self.running: list[Sequence] = []
        self.over_quota: set[Quota | None] = set()  # of those that wait for nothing but their tenant's room
        self._filling = Filling()
        self.tail_tokens = 0  # of a prompt, that are computed in a step of their own where that delays nobody; 0: none
        self.preemptions = 0  # so far

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has no pages yet.

        Raises `Overloaded` where the queue is full, `InvalidRequest` where no amount of waiting would make room.
        """
        self._room.check_fits(sequence)
        if len(self.waiting) >= self.config.max_waiting:
            raise Overloaded(
                f"{len(self.waiting)} sequences wait already", request_id=sequence.request_id, stage="queue"
            )
        sequence.order = next(self._orders)
        self.waiting.append(sequence)

    def check_fits(self, sequence: Sequence) -> None:
        """Raise `InvalidRequest` where the whole pool is too small for this sequence."""
        self._room.check_fits(sequence)

    def admit(self, sequence: Sequence, keys: SequenceOf[PageKey]) -> None:
        """Give a sequence the pages that are held of `keys`, and credit as far as its answer is expected to go.

        Raises `OutOfPages` where there is no room.
        """
        self._room.admit(sequence, keys)

    def join(self, sequence: Sequence) -> None:
        """Take a sequence that was admitted, brings its prompt's pages and has its first token. The caller keeps to
        `max_sequences`.
        """
        sequence.order = next(self._orders)
        sequence.scored = sequence.prompt_len - 1
        self.running.append(sequence)

    def arrived(self, sequence: Sequence) -> None:
        """Let a sequence of `arriving` run, on the pages that it has by now."""
        self.arriving.remove(sequence)
        sequence.fetchable = 0
        self.running.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def computing(self) -> list[Sequence]:
        """Whose result a step that fails may take with it: also sequences that were preempted with one under way."""
        return [*self.running, *(sequence for sequence in self.waiting if sequence.under_way)]

    @property
    def queued_tokens(self) -> int:
        """Tokens of prompts, and of what was preempted, that are still to be computed."""
        on_their_way = sum(len(s.pages) - s.sealed for s in self.arriving) * self.config.page_size
        admitted = sum(s.pending for s in (*self.running, *self.arriving) if s.pending > 1)
        return sum(s.pending for s in self.waiting) + admitted - on_their_way

    def schedule(self) -> list[Chunk]:
        """The next step's chunks: decode rows (one token each) first."""
        self.seat()
        pending = [(sequence, sequence.pending) for sequence in self.running]
        chunks = [Chunk(s, s.computed, s.computed + 1, True) for s, count in pending if count == 1]
        budget = self.config.token_budget - len(chunks)
        # Where nothing is left over for later, all prompts end with the next step whether it is empty or has tails.
        tail = 0 if self.waiting or sum(count for _, count in pending if count > 1) > budget else self.tail_tokens
        for sequence, count in pending:
            if count > 1 and budget > 0:
                chunks.append(self._chunk(sequence, count, budget, tail))
                budget -= chunks[-1].count
        return self._with_pages(chunks)

    def _chunk(self, sequence: Sequence, count: int, budget: int, tail: int) -> Chunk:
        """A prompt's next part, of `count` tokens that are still to be computed."""
        start = sequence.computed
        end = start + min(count, budget)
        whole = (start + count - tail) // self.config.page_size * self.config.page_size  # pages before the tail
        if 0 < 2 * tail <= count and whole > start:
            end = whole
        if start < sequence.scored < end:  # from there on log-probabilities are wanted once more
            end = sequence.scored
        return Chunk(sequence, start, end, is_last=end == start + count)

    def seat(self) -> None:
        """Move waiting sequences into the batch, in order, while there is room for all that they are expected to need.

        Those that wait for another's pages are passed by, and so are those whose tenant has had its share. One that has
        more pages elsewhere goes to `arriving` first.
        """
        self.over_quota.clear()
        for sequence in list(self.waiting):
            if len(self.running) + len(self.arriving) >= self.config.max_sequences:
                return
            if sequence.under_way:  # preempted, and its newest token is not known yet
                return
            if sequence.quota in self.over_quota or self._awaits(sequence):
                continue
            try:
                self.admit(sequence, self._reusable(sequence))
            except OverQuota:
                self.over_quota.add(sequence.quota)
                continue
            except OutOfPages:
                return
            self.waiting.remove(sequence)
            sequence.computed = len(sequence.pages) * self.config.page_size
            self._filling.begin(sequence)
            (self.arriving if sequence.fetchable > len(sequence.pages) else self.running).append(sequence)

    def launched(self, chunks: Iterable[Chunk]) -> None:
        """Note that the chunks' computation is under way: what is scheduled from now on goes on after it."""
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.start < sequence.prompt_len and chunk.scored:
                sequence.scored = chunk.start + chunk.scored
            sequence.computed = chunk.end
            sequence.unread += chunk.is_last
            sequence.under_way += 1

    def read(self, chunk: Chunk) -> None:
        """Note that a chunk's result has arrived, also the token sampled after it; the pages it filled are sealed."""
        sequence = chunk.sequence
        sequence.under_way -= 1
        sequence.unread -= chunk.is_last
        if sequence.computed:  # else its pages are gone
            self.written(sequence, chunk.end)

    def written(self, sequence: Sequence, end: int) -> None:
        """Note that K and V of the first `end` tokens are in the pages, and seal the pages that they fill."""
        for index in range(sequence.sealed, end // self.config.page_size):
            if self.pool.seal(sequence.pages[index], self._key(sequence, index)):
                keys = sequence.keys
                self._on_seal(Lineage(keys[index], keys[0], keys[index - 1] if index else None))
            self._filling.sealed(sequence, sequence.keys[index])
            sequence.sealed += 1

    def advance(self, sequence: Sequence, count: int) -> None:
        """Note `count` more tokens whose K and V are in the pages already."""
        sequence.computed += count
        self.written(sequence, sequence.computed)

    def seal_tail(self, sequence: Sequence) -> None:
        """Seal the part-filled last page, under no key, for the caller knows that no more will be written."""
        for page in sequence.pages[sequence.sealed :]:
            self.pool.seal(page, None)
            sequence.sealed += 1

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its state, and let its pages go."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.arriving:
            self.arriving.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._filling.end(sequence)
        self._room.learn(sequence)
        self._room.leave(sequence)
        sequence.dropped = True

    def _reusable(self, sequence: Sequence) -> list[PageKey]:
        """The keys of the pages that it can do without computing."""
        # At least one token must be computed, for there is no next token without its logits.
        known = len(sequence.tokens) - 1
        if sequence.sampling.prompt_logprobs is not None and sequence.scored < sequence.prompt_len - 1:
            known = sequence.scored  # they need the logits of every position
        return sequence.keys[: known // self.config.page_size]

    def _awaits(self, sequence: Sequence) -> bool:
        """Whether somebody who was admitted is about to seal the next page that this one lacks: it is not filled twice.

        It waits for the last page that they have in common. When that is sealed, or who fills it ends, is dropped or
        preempted, it looks again.
        """
        if sequence.awaited not in self._filling:
            keys = self._reusable(sequence)
            sequence.awaited = self._filling.last_of_run(keys[len(self.pool.match(keys)) :])
        return sequence.awaited is not None

    def _with_pages(self, chunks: list[Chunk]) -> list[Chunk]:
        """Those of the chunks for which there are pages, now that they have them."""
        size = self.config.page_size
        left_out: set[Sequence] = set()
        for chunk in chunks:
            if chunk.end > len(chunk.sequence.pages) * size and chunk.sequence not in left_out:
                left_out |= self._make_room(chunk)
        return [chunk for chunk in chunks if chunk.sequence not in left_out] if left_out else chunks

    def _make_room(self, chunk: Chunk) -> set[Sequence]:
        """Give a chunk its pages, if need be those of others; returns the sequences that cannot run in this step."""
        sequence, left_out = chunk.sequence, set[Sequence]()
        while sequence not in left_out and not self._room.grow(sequence, chunk.end):
            loser = self._room.loser(sequence, self.running)
            if loser is None:  # pulls, pins or sequences on their way have the pages
                return left_out | {sequence}
            log.info("no page is left for %s", sequence.request_id)
            self._preempt(loser)
            left_out.add(loser)
        return left_out

    def _preempt(self, sequence: Sequence) -> None:
        """Back into the line, before all that came later. A token that is under way still counts."""
        pages, loss = len(sequence.pages), self._room.loss(sequence)
        log.info("%s gives up %d pages; up to %d tokens are computed again", sequence.request_id, pages, loss)
        self.running.remove(sequence)
        self._filling.end(sequence)
        self._room.leave(sequence)
        sequence.computed = 0
        self.preemptions += 1
        self.waiting.insert(bisect(self.waiting, sequence.order, key=lambda s: s.order), sequence)

    def _key(self, sequence: Sequence, index: int) -> PageKey:
        """The key of a full page; chained on for pages that hold sampled tokens."""
        size = self.config.page_size
        while len(sequence.keys) <= index:
            start = len(sequence.keys) * size
            previous = sequence.keys[-1] if sequence.keys else sequence.root
            sequence.keys.append(next_key(previous, pack_tokens(sequence.tokens[start : start + size])))
        return sequence.keys[index]

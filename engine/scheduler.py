"""Which tokens are computed next, and which pages hold them. Pure bookkeeping: no torch, no clock."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.sequence import Sequence
from kvstore.keys import PageKey, next_key, pack_tokens
from kvstore.pool import OutOfPages, PagePool
from protos.errors import InvalidRequest, Overloaded


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
        if sequence.sampling.prompt_logprobs is None:
            return 0
        return max(0, min(self.count, sequence.prompt_len - 1 - self.start))


class Scheduler:
    """Continuous batching: every step takes decode rows first, then prompt chunks in order of arrival.

    `on_seal(family, key)` hears of every full page that becomes reusable; the family is the key of the
    sequence's first page.
    """

    def __init__(
        self,
        pool: PagePool,
        config: EngineConfig,
        root: PageKey,
        on_seal: Callable[[PageKey, PageKey], None] = lambda family, key: None,
    ) -> None:
        self.pool = pool
        self.config = config
        self._root = root
        self._on_seal = on_seal
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has no pages yet.

        Raises `Overloaded` where the queue is full, `InvalidRequest` where no amount of waiting would make room.
        """
        self.check_fits(sequence)
        if len(self.waiting) >= self.config.max_waiting:
            raise Overloaded(
                f"{len(self.waiting)} sequences wait already", request_id=sequence.request_id, stage="queue"
            )
        self.waiting.append(sequence)

    def pages_for(self, sequence: Sequence) -> int:
        """Pages that the sequence will need by its end. Its last token is sampled and never computed."""
        return -(-(sequence.max_len - 1) // self.config.page_size)

    def check_fits(self, sequence: Sequence) -> None:
        """Raise `InvalidRequest` where the whole pool is too small for this sequence."""
        needed = self.pages_for(sequence)
        if needed > self.pool.total_pages:
            raise InvalidRequest(
                f"{sequence.max_len} tokens need {needed} pages, and the pool has {self.pool.total_pages}",
                field="prompt",
                request_id=sequence.request_id,
                stage="queue",
            )

    def join(self, sequence: Sequence) -> None:
        """Take a sequence that brings its pages and its credit. The caller keeps to `max_sequences`."""
        self.running.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        return sum(s.pending for s in self.waiting) + sum(s.pending for s in self.running if s.pending > 1)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks: decode rows (one token each) first."""
        self._admit()
        pending = [(sequence, sequence.pending) for sequence in self.running]
        chunks = [Chunk(s, s.computed, s.computed + 1, True) for s, count in pending if count == 1]
        budget = self.config.token_budget - len(chunks)
        for sequence, count in pending:
            if count > 1 and budget > 0:
                taken = min(count, budget)
                start = sequence.computed
                chunks.append(Chunk(sequence, start, start + taken, is_last=taken == count))
                budget -= taken
        size = self.config.page_size
        for chunk in chunks:
            if chunk.end > len(chunk.sequence.pages) * size:
                self._grow(chunk)
        return chunks

    def launched(self, chunks: Iterable[Chunk]) -> None:
        """Note that the chunks' computation is under way: what is scheduled from now on goes on after it."""
        for chunk in chunks:
            chunk.sequence.computed = chunk.end
            chunk.sequence.unread += chunk.is_last

    def written(self, sequence: Sequence, end: int) -> None:
        """Note that K and V of the first `end` tokens are in the pages, and seal the pages that they fill."""
        for index in range(sequence.sealed, end // self.config.page_size):
            if self.pool.seal(sequence.pages[index], self._key(sequence, index)):
                self._on_seal(sequence.keys[0], sequence.keys[index])
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
        """Forget a sequence and let its pages go, the last one first so that prefixes outlive their tails."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.credit is not None:
            sequence.credit.close()
        for page in reversed(sequence.pages[sequence.sealed :]):
            self.pool.abandon(page)
        self.pool.release(list(reversed(sequence.pages[: sequence.sealed])))
        sequence.pages.clear()
        sequence.sealed = 0
        sequence.dropped = True

    def _admit(self) -> None:
        """Move waiting sequences into the batch, in order, while there is room for all their pages."""
        while self.waiting and len(self.running) < self.config.max_sequences:
            sequence = self.waiting[0]
            size = self.config.page_size
            # At least one token must be computed, for there is no first token without its logits.
            usable = sequence.keys[: (len(sequence.tokens) - 1) // size]
            if sequence.sampling.prompt_logprobs is not None:  # they need the logits of every position
                usable = []
            try:
                pages, credit = self.pool.admit(usable, self.pages_for(sequence))
            except OutOfPages:
                return
            sequence.pages, sequence.credit = pages, credit
            sequence.sealed = sequence.prefix_pages = len(pages)
            sequence.computed = len(pages) * size
            self.running.append(self.waiting.popleft())

    def _grow(self, chunk: Chunk) -> None:
        """Turn credit into pages until they hold the chunk."""
        sequence = chunk.sequence
        while chunk.end > len(sequence.pages) * self.config.page_size:
            assert sequence.credit is not None
            page = sequence.credit.take()
            self.pool.begin_fill(page)
            sequence.pages.append(page)

    def _key(self, sequence: Sequence, index: int) -> PageKey:
        """The key of a full page; chained on for pages that hold sampled tokens."""
        size = self.config.page_size
        while len(sequence.keys) <= index:
            start = len(sequence.keys) * size
            previous = sequence.keys[-1] if sequence.keys else self._root
            sequence.keys.append(next_key(previous, pack_tokens(sequence.tokens[start : start + size])))
        return sequence.keys[index]

"""Which sequences get pages: as many as their answers are expected to need, and more where those get longer."""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from engine.answer_lengths import Expectation
from engine.sequence import Sequence
from kvstore.keys import PageKey
from kvstore.pool import Credit, OutOfPages, PagePool
from protos.errors import InvalidRequest

# Sequences are spread over the distribution of answers, without its shortest quarter: pages then seldom run out.
_SHARES = 0.75
_GOLDEN = 0.6180339887498949  # multiples of it, less their whole parts, lie evenly between 0 and 1


class Room:
    """The pool's pages, shared out among the sequences of one engine.

    Together, the credit of all sequences is what they are expected to need at their peak, when some have ended and the
    others go on. Each has at least the pages of the tokens that it was admitted with; one that grows beyond its own
    credit gets a page that the pool has promised to nobody, or one of another sequence's that is not due yet.

    Each is given a length out of the distribution, and the peak follows from these: so does the Past-Future scheduler
    (Gong et al., ASPLOS 2025).
    """

    def __init__(self, pool: PagePool, page_size: int, lengths: Expectation) -> None:
        self._pool = pool
        self._page_size = page_size
        self._lengths = lengths
        self._seen = 0  # sequences so far
        self._admitted: dict[Sequence, None] = {}
        self._refused: tuple[Sequence, int, int] | None = None  # who, pages found for it, pages that were available
        self._why: type[OutOfPages] = OutOfPages

    def check_fits(self, sequence: Sequence) -> None:
        """Raise `InvalidRequest` where the whole pool, or the tenant's share of it, is too small for this sequence."""
        needed = self._pages(sequence.max_len - 1)  # the last token is sampled and never computed
        most, whose = self._pool.total_pages, "the pool has"
        if sequence.quota is not None and sequence.quota.limit < most:
            most, whose = sequence.quota.limit, "the tenant may have"
        if needed > most:
            raise InvalidRequest(
                f"{sequence.max_len} tokens need {needed} pages, and {whose} {most}",
                field="prompt",
                request_id=sequence.request_id,
                stage="queue",
            )

    def admit(self, sequence: Sequence, keys: SequenceOf[PageKey]) -> None:
        """Give a sequence what is held of `keys`, and credit for what it adds to the peak.

        Raises `OutOfPages` where the pool has not so much, `OverQuota` where it is the tenant that may not.
        """
        found = len(self._pool.match(keys))
        case = sequence, found, self._pool.available_to(sequence.quota)
        if case == self._refused:  # it is tried again in each step
            raise self._why(f"nothing was given back since {sequence.request_id} was refused")
        self._expect(sequence)
        sequence.prefix_pages = found
        promised = sum(_own(s) + _credit(s).remaining for s in self._admitted)
        added = self._peak([*self._admitted, sequence]) - promised
        credit = max(added, self._pages(len(sequence.tokens)) - found)
        if sequence.quota is not None:  # what others are short of is nothing to this tenant
            credit = min(credit, self._pages(sequence.max_len - 1) - found)
        try:
            sequence.pages, sequence.credit = self._pool.admit(keys, found + credit, sequence.quota)
        except OutOfPages as error:
            self._refused, self._why = case, type(error)
            raise
        sequence.sealed = found
        self._admitted[sequence] = None

    def grow(self, sequence: Sequence, end: int) -> bool:
        """Give a sequence pages until they hold `end` tokens; False where one is lacking."""
        credit = _credit(sequence)
        while end > len(sequence.pages) * self._page_size:
            if not credit.remaining and not self._borrow(sequence):
                return False
            page = credit.take()
            self._pool.begin_fill(page)
            sequence.pages.append(page)
        self._expect(sequence)
        return True

    def leave(self, sequence: Sequence) -> None:
        """Take pages and credit back where it has any, the last page first so that prefixes outlive their tails."""
        if sequence not in self._admitted:
            return
        del self._admitted[sequence]
        _credit(sequence).close()
        for page in reversed(sequence.pages[sequence.sealed :]):
            self._pool.abandon(page)
        self._pool.release(list(reversed(sequence.pages[: sequence.sealed])))
        sequence.pages.clear()
        sequence.sealed = 0

    def learn(self, sequence: Sequence) -> None:
        """Note how long the answer of a sequence got that goes on no more, for whatever reason."""
        answered = len(sequence.tokens) - sequence.prompt_len
        if answered:
            self._lengths.note(answered, ended=len(sequence.tokens) < sequence.max_len)

    def loser(self, sequence: Sequence, running: Iterable[Sequence]) -> Sequence | None:
        """Who gives its pages up for this one: what costs least to bring back, and of equals the youngest.

        The oldest never does, so there is always one that gets to its end; None where it is alone. Where it is a tenant
        that lacks room, its own sequences make it.
        """
        rivals = self._rivals(sequence, running)
        oldest = min(rivals, key=lambda s: s.order)
        others = [s for s in rivals if s is not oldest]
        return min(others, key=lambda s: (self.loss(s), -s.order), default=None)

    def loss(self, sequence: Sequence) -> int:
        """Tokens to compute again if the sequence gives up its pages. What others read as well stays; the rest counts
        as lost, for the room is wanted.
        """
        shared = 0
        for page in sequence.pages[: sequence.sealed]:
            if self._pool.readers(page) < 2:
                break
            shared += 1
        return sequence.computed - shared * self._page_size

    def _borrow(self, sequence: Sequence) -> bool:
        """Add a page to a sequence's credit: from the pool, or of another one that has most to spare for now."""
        credit = _credit(sequence)
        if self._pool.available_to(sequence.quota) > 0:
            credit.extend(1)
            return True
        lender = max(self._rivals(sequence, self._admitted), key=self._spare)
        if self._spare(lender) < 1:
            return False
        credit.take_over(_credit(lender))
        return True

    @staticmethod
    def _rivals(sequence: Sequence, among: Iterable[Sequence]) -> list[Sequence]:
        """Those whose pages this one can have: those of its tenant alone, where that has had its share."""
        quota = sequence.quota
        own = quota is not None and quota.available < 1
        return [other for other in among if not own or other.quota is quota]

    def _spare(self, sequence: Sequence) -> int:
        """Pages that a sequence was promised for tokens which it does not have yet."""
        return len(sequence.pages) + _credit(sequence).remaining - self._pages(_length(sequence))

    def _expect(self, sequence: Sequence) -> None:
        """Foresee where a sequence ends."""
        if not sequence.share:
            self._seen += 1
            sequence.share = 1.0 - _SHARES * (self._seen * _GOLDEN % 1.0)
        prompt_len = sequence.prompt_len
        answered, most = _length(sequence) - prompt_len, sequence.max_len - prompt_len
        sequence.expected_len = prompt_len + self._lengths.expected(answered, most, sequence.share)

    def _peak(self, sequences: Iterable[Sequence]) -> int:
        """Pages that these will hold when they hold most, if each ends at its expected length; those that were found
        when it was admitted are not counted.
        """
        to_come = sorted(((max(1, s.expected_len - _length(s)), s) for s in sequences), key=lambda pair: -pair[0])
        tokens = peak = 0
        for alive, (steps, sequence) in enumerate(to_come, 1):
            # When this one ends, those before it are still there, and one token further when its pages come back.
            # Its last token needs no room.
            tokens += _length(sequence) - sequence.prefix_pages * self._page_size + self._page_size - 2
            peak = max(peak, tokens + alive * (steps + 1) - 1)
        return peak // self._page_size

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _length(sequence: Sequence) -> int:
    """Tokens that it has, also the one that the host has not read."""
    return len(sequence.tokens) + sequence.unread


def _own(sequence: Sequence) -> int:
    """Pages that it has filled or will; others may have come to read them too."""
    return len(sequence.pages) - sequence.prefix_pages


def _credit(sequence: Sequence) -> Credit:
    assert sequence.credit is not None, "only an admitted sequence has credit"
    return sequence.credit

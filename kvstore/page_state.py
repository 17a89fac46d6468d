"""The states of a page, and the moves between them."""

from enum import IntEnum
from typing import NewType

PageId = NewType("PageId", int)


class PageState(IntEnum):  # an int, so that looking up its moves costs no call of Enum's own hash
    """FREE -> RESERVED -> FILLING -> SEALED -> EVICTING -> FREE."""

    FREE = 0
    RESERVED = 1  # has an owner, holds nothing yet
    FILLING = 2  # its writer writes
    SEALED = 3  # complete: may be read, is never written again
    EVICTING = 4  # leaves the index; nobody can reach it any more


MOVES: dict[PageState, tuple[PageState, ...]] = {
    PageState.FREE: (PageState.RESERVED,),
    PageState.RESERVED: (PageState.FILLING, PageState.FREE),  # FREE: abandoned
    PageState.FILLING: (PageState.SEALED, PageState.FREE),  # FREE: abandoned
    PageState.SEALED: (PageState.EVICTING,),
    PageState.EVICTING: (PageState.FREE,),
}


class IllegalMove(RuntimeError):
    """The caller asked for what the page's state or its counts of readers and writers do not allow."""

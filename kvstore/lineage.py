"""What a page is."""

from dataclasses import dataclass

from kvstore.keys import PageKey


@dataclass(frozen=True, slots=True)
class Lineage:
    """A page under its key, and what comes before it. Its children are the pages of which it is the parent."""

    key: PageKey
    family: PageKey  # key of its prompt's first page
    parent: PageKey | None  # key of the page before it; None for the first
    checksum: int = 0  # of its bytes, where whoever computed them makes checksums

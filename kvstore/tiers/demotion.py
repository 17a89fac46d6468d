"""What is to be done for the disk."""

from dataclasses import dataclass

from kvstore.lineage import Lineage
from kvstore.page_state import PageId


@dataclass(frozen=True)
class Demotion:
    """A page that is wanted on the disk. `page` is None where it is there already and has only been used."""

    lineage: Lineage
    page: PageId | None
    generation: int

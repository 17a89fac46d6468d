"""What somebody asks a store for."""

from dataclasses import dataclass, field

from kvstore.lineage import Lineage
from kvstore.page_state import PageId


@dataclass
class Run:
    """Leading pages of a prompt that somebody asks for; those in the host are read until the run ends."""

    lineages: list[Lineage] = field(default_factory=list)
    pages: list[PageId | None] = field(default_factory=list)  # of the host; None until it comes from the disk
    room: dict[int, PageId] = field(default_factory=dict)  # to be filled from the disk, by their places in the run

"""A page that others may pull, and where it is."""

from dataclasses import dataclass
from typing import Self

from kvstore.keys import KEY_BYTES, PageKey
from kvstore.lineage import Lineage
from kvstore.page_state import PageId
from protos.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class SealedPage:
    """A page that is in its owner's index, and its place as long as that is so."""

    lineage: Lineage
    page: PageId
    generation: int

    def to_proto(self) -> worker_pb2.SealedPages.Page:
        """The page as a message."""
        return worker_pb2.SealedPages.Page(
            key=self.lineage.key,
            family=self.lineage.family,
            parent=self.lineage.parent or b"",
            ref=self.to_ref(),
        )

    def to_ref(self, index: int = 0) -> worker_pb2.PageRef:
        """Where it is, as page `index` of a run."""
        return worker_pb2.PageRef(
            index=index, page=self.page, generation=self.generation, checksum=self.lineage.checksum
        )

    @classmethod
    def from_proto(cls, message: worker_pb2.SealedPages.Page) -> Self:
        """The message as a page; `ValueError` where its keys are none."""
        if {len(message.key), len(message.family), len(message.parent) or KEY_BYTES} != {KEY_BYTES}:
            raise ValueError(f"a sealed page's keys must have {KEY_BYTES} bytes each")
        parent = PageKey(message.parent) if message.parent else None
        lineage = Lineage(PageKey(message.key), PageKey(message.family), parent, message.ref.checksum)
        return cls(lineage, PageId(message.ref.page), message.ref.generation)

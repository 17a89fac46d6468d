"""Whose request it is."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tenant:
    """The keys of its pages come from its secret: it shares no page with others, and cannot find out what they hold."""

    secret: str = field(repr=False)
    name: str = ""
    api_key: str = field(default="", repr=False)
    max_pages: int | None = None  # that it may have in each worker's pool; None: as many as that has

"""The workers that this router knows: the directory names them, a link to each says whether they live."""

import asyncio
import logging
from collections import Counter

from kvstore.directory import STORE_POOL, DirectoryReader, WorkerRecord
from kvstore.page_format import PageFormat
from protos import errors
from router.worker_link import Name, WorkerLink

log = logging.getLogger(__name__)

POLL_S = 0.5

Identity = tuple[str, PageFormat]  # weights' fingerprint, page format


class Fleet:
    """Polls the directory, and holds one link for each life of a worker. Page stores are known by their records alone.

    A worker that is no longer listed gets nothing new, and its link is kept as long as it answers `Describe`: so it
    can finish what it has, and a frozen one is given up soon after its lease. A directory that lists nobody has
    been lost itself; then every worker that answers stays in use.
    """

    def __init__(self, directory: DirectoryReader, router_id: str) -> None:
        self.directory = directory
        self.directory_up = True
        self.links: dict[Name, WorkerLink] = {}
        self._router_id = router_id
        self._stores: list[WorkerRecord] = []
        self._listed: frozenset[Name] = frozenset()
        self._foreign: frozenset[Name] = frozenset()
        self._doubts: dict[Name, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the directory once, then keep reading. Raises `MetadataUnavailable`."""
        self._apply(await self.directory.workers())
        self._task = asyncio.create_task(self._watch(), name="fleet")

    async def stop(self) -> None:
        """Stop reading and close every link."""
        tasks = {*self._doubts.values(), *([self._task] if self._task else [])}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.gather(*(link.stop("is left: the router stops") for link in self.links.values()))
        self.links.clear()

    def usable(self, pool: str) -> list[WorkerLink]:
        """Live workers of a pool that take new requests and whose pages all have one identity."""
        identity = self.identity()
        return [link for link in self._working() if link.record.pool == pool and _identity(link) == identity]

    def holders(self) -> dict[str, WorkerRecord]:
        """Whose pages can be had, by their names in the directory: live workers, also those that drain, and stores."""
        workers = [link.record for link in self._connected()]
        return {record.holder: record for record in (*workers, *self._stores)}

    def identity(self) -> Identity | None:
        """What the live workers' pages have in common; of most of them, should they differ. None without workers."""
        counts = Counter(map(_identity, self._working()))
        return counts.most_common(1)[0][0] if counts else None

    def _working(self) -> list[WorkerLink]:
        """Those that take new requests, whatever their pages are like."""
        return [link for link in self._connected() if not link.record.draining]

    def _connected(self) -> list[WorkerLink]:
        listed = self._listed or self.links.keys()
        return [link for name, link in self.links.items() if link.live and name in listed]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                self._apply(await self.directory.workers())
                self._note_directory(up=True)
                self._note_foreign()
            except errors.MetadataUnavailable as error:
                self._note_directory(up=False, why=error.message)
            except Exception:  # whatever it is, the next reading may be better
                log.exception("the directory could not be read")

    def _apply(self, records: list[WorkerRecord]) -> None:
        """Open links to workers that are new, and doubt those that are no longer listed."""
        self._stores = [record for record in records if record.pool == STORE_POOL]
        listed = {(record.worker_id, record.incarnation): record for record in records if record.pool != STORE_POOL}
        for name, record in listed.items():
            if link := self.links.get(name):
                link.renew(record)
            else:
                self.links[name] = WorkerLink(record, self._router_id)
        self._listed = frozenset(listed)
        for name in self.links.keys() - listed.keys() - self._doubts.keys():
            self._doubts[name] = asyncio.create_task(self._doubt(name), name=f"is {name[0]} alive")

    async def _doubt(self, name: Name) -> None:
        """Close the link to an unlisted worker unless the worker itself says that it lives."""
        link = self.links[name]
        try:
            if not await link.probe() and name not in self._listed:
                await link.stop("has lost its lease and does not answer")
                del self.links[name]
        finally:
            del self._doubts[name]

    def _note_directory(self, *, up: bool, why: str = "") -> None:
        """Log once when the directory goes, and once when it is back."""
        if up and not self.directory_up:
            log.info("the directory answers again")
        elif not up and self.directory_up:
            log.warning("the directory does not answer, the last known workers stay: %s", why)
        self.directory_up = up

    def _note_foreign(self) -> None:
        """Log workers that serve other weights or another page format; each once."""
        identity = self.identity()
        foreign = {link.name: link for link in self._working() if _identity(link) != identity}
        for name in foreign.keys() - self._foreign:
            fingerprint, page_format = _identity(foreign[name])
            difference = identity[1].difference(page_format) if identity else ""
            what = difference or f"weights {fingerprint}"
            log.error("worker %s is left out, it differs from most: %s", name[0], what)
        self._foreign = frozenset(foreign)


def describe(fleet: Fleet, pool: str) -> str:
    """What is known of a pool, for an error's message."""
    links = [link for link in fleet.links.values() if link.record.pool == pool]
    live = [link for link in links if link.live]
    draining = [link for link in live if link.record.draining]
    return f"{len(links)} known, {len(live)} connected, {len(draining)} draining"


def _identity(link: WorkerLink) -> Identity:
    return link.record.fingerprint, link.record.format

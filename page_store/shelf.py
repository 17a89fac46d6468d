"""What a store has once it knows the format of its pages: their memory, their disk, and its name in the directory."""

import logging
from pathlib import Path

from kvstore.announcer import Announcer
from kvstore.directory import STORE_POOL, DirectoryWriter, WorkerRecord
from kvstore.lineage import Lineage
from kvstore.page_format import PageFormat
from kvstore.segment import Segment
from kvstore.tiers.page_files import PageFiles
from kvstore.tiers.page_tiers import PageTiers
from kvstore.transports import registry
from page_store.config import PageStoreConfig
from protos import errors

log = logging.getLogger(__name__)


class Shelf:
    """Pages of one format."""

    def __init__(
        self,
        config: PageStoreConfig,
        address: str,
        incarnation: int,
        page_format: PageFormat,
        writer: DirectoryWriter,
    ) -> None:
        """`address` is that of the store's gRPC service. Raises `FixTheSetup` where not one page fits into the host."""
        num_pages = config.host_bytes // page_format.page_bytes
        if not num_pages:
            raise errors.FixTheSetup(
                f"a page has {page_format.page_bytes} bytes, and the page store may take {config.host_bytes}",
                stage="start",
            )
        self.format = page_format
        self._config = config
        self._address = address
        self._segment = Segment.create(page_format, num_pages, incarnation)
        self._servers = registry.serve(config.transports, self._segment, config.host)
        self._announcer = Announcer(writer, self.record)
        files = _open_files(config, page_format)
        self.tiers = PageTiers(self._segment, files, config.disk_bytes, self._arrived, self._announcer.evicted)
        if config.disk_dir is not None and files is None:
            self.tiers.ledger.count(disk_errors=1)

    def start(self) -> None:
        """Register, and keep the tiers going. Returns at once."""
        self.tiers.start()
        self._announcer.start()

    def record(self) -> WorkerRecord:
        """For the directory. Pages of any weights may be here, their keys tell; so it names no model."""
        (_, host), (_, disk) = self.tiers.ledger.host, self.tiers.ledger.disk
        return WorkerRecord(
            worker_id=self._config.store_id,
            incarnation=self._segment.incarnation,
            pool=STORE_POOL,
            address=self._address,
            model="",
            fingerprint="",
            format=self.format,
            max_tokens=0,
            endpoints=tuple((s.endpoint.transport, s.endpoint.address) for s in self._servers),
            load={"host_pages": host, "disk_pages": disk},
        )

    def close(self) -> None:
        """Deregister, end the threads, give back the memory. Takes a while, and nobody may bring pages any more."""
        self._announcer.stop()
        self.tiers.close()
        for server in self._servers:
            server.close()
        self._segment.close()

    def _arrived(self, page: Lineage) -> None:
        self._announcer.sealed(page.family, page.key)


def _open_files(config: PageStoreConfig, page_format: PageFormat) -> PageFiles | None:
    """The disk's pages; None where there is no disk tier, or none that can be used."""
    if config.disk_dir is None:
        return None
    try:
        return PageFiles(Path(config.disk_dir), page_format)
    except errors.FixTheSetup as error:
        log.error("the page store goes on without a disk: %s", error.message)
        return None

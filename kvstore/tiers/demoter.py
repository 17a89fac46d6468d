"""Brings pages from the host to the disk, in a thread of its own."""

import logging
import threading
import time

from kvstore.segment import Segment
from kvstore.tiers.demotion import Demotion
from kvstore.tiers.ledger import Ledger
from kvstore.tiers.page_files import PageFiles

_PERIOD_S = 0.2  # between two looks for what is due
_STOP_S = 10.0
log = logging.getLogger(__name__)


class Demoter:
    """Writes what is due, a while after it has come; so its room in the host can be taken at any time.

    It keeps no page from being evicted: as every reader of pages it copies first and compares generations then. Where
    the disk is full or cannot be written, pages live in the host alone, and each is tried once.
    """

    def __init__(self, ledger: Ledger, segment: Segment, files: PageFiles | None) -> None:
        """Without `files` it only lets go of prompts that do not grow any more."""
        self._ledger = ledger
        self._segment = segment
        self._files = files
        self._stamp_ns = 0
        self._failing = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demoter", daemon=True)

    def start(self) -> None:
        """Find what an earlier process left on the disk, then write what comes. Returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End after the page in hand."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        if self._files is not None:
            self._find(self._files)
        while not self._stopping.wait(_PERIOD_S):
            self._ledger.let_go_quiet()
            while self._files is not None and not self._stopping.is_set():
                demotion = self._ledger.next_demotion()
                if demotion is None:
                    break
                self._demote(self._files, demotion)

    def _find(self, files: PageFiles) -> None:
        try:
            found, dropped = files.scan()
            self._ledger.count(dropped_corrupt=dropped)
            for lineage in found:
                self._remove(files)
                self._ledger.on_disk(lineage)
            log.info("%d pages are on the disk from before, %d files were of no use", len(found), dropped)
        except OSError as error:
            self._refused(error)

    def _demote(self, files: PageFiles, demotion: Demotion) -> None:
        # Strictly rising: the file system's own times are too coarse to tell the order of pages.
        self._stamp_ns = max(time.time_ns(), self._stamp_ns + 1)
        lineage, page = demotion.lineage, demotion.page
        try:
            if page is None:
                files.touch(lineage.key, self._stamp_ns)
                return
            copy = self._segment.pages[page].tobytes()
            if self._segment.generations[page] != demotion.generation:
                return  # its room was wanted in the meantime
            files.write(lineage, memoryview(copy), self._stamp_ns)
            self._remove(files)
        except OSError as error:
            self._refused(error)
            return
        self._failing = False
        self._ledger.on_disk(lineage)
        self._ledger.count(demoted=1)

    def _remove(self, files: PageFiles) -> None:
        for key in self._ledger.make_disk_room():
            files.remove(key)

    def _refused(self, error: OSError) -> None:
        self._ledger.count(disk_errors=1)
        if not self._failing:
            log.warning("the disk takes no pages, the store goes on without: %s", error)
        self._failing = True

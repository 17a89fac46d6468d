"""Pages on a disk: one checked file each.

    header | page | BLAKE2b-256 of both

The header is magic, version, bytes of the page, digest of the format, key, family, parent, and checksum or 0.

A file gets its name when it is complete, and is believed only as far as its digest goes. So nothing is synced: what a
crash tears is found out when it is read. Files are named by key, in 256 folders. Pages tell what was said: nobody else
can look into the folder.
"""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from kvstore.keys import KEY_BYTES, PageKey
from kvstore.lineage import Lineage
from kvstore.page_format import PageFormat
from protos import errors

_HEADER = struct.Struct("<8sIQ16s16s16s16sQ")
_MAGIC = b"diptychP"
_VERSION = 2
_DIGEST_BYTES = 32
_NO_PARENT = bytes(KEY_BYTES)
_SUFFIX, _UNFINISHED = ".page", ".part"
_PRIVATE = 0o700


class CorruptFile(Exception):
    """The file is not what was written: torn, altered, of another format, or not there."""


class PageFiles:
    """The files of one page format in one folder, which this process alone uses. Keeps no index.

    Several threads may call, but for one key one at a time. What the disk refuses is an `OSError`.
    """

    def __init__(self, folder: Path, page_format: PageFormat) -> None:
        """Raises `FixTheSetup` where the folder cannot be written or kept to this user, or another process uses it."""
        self._folder = folder
        self._page_bytes = page_format.page_bytes
        self._format = _digest_of(page_format)
        try:
            folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            _keep_private(folder)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise errors.FixTheSetup(f"{folder} cannot be used for pages: {error.strerror}", stage="disk") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError as error:
            os.close(self._lock)
            raise errors.FixTheSetup(f"{folder} is used by another page store", stage="disk") from error

    @property
    def file_bytes(self) -> int:
        """Of one page's file."""
        return _HEADER.size + self._page_bytes + _DIGEST_BYTES

    def write(self, lineage: Lineage, page: memoryview, stamp_ns: int) -> None:
        """Keep a page under its key; `stamp_ns` becomes its time of last use."""
        path = self._path(lineage.key)
        unfinished = path.with_suffix(_UNFINISHED)
        header = self._header(lineage)
        digest = blake2b(header, digest_size=_DIGEST_BYTES)
        digest.update(page)
        try:
            path.parent.mkdir(mode=_PRIVATE, exist_ok=True)
            with open(unfinished, "wb", buffering=0, opener=_open_private) as file:
                for part in (header, page, digest.digest()):
                    _write_all(file.fileno(), memoryview(part))
            os.utime(unfinished, ns=(stamp_ns, stamp_ns))
            unfinished.replace(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise

    def read(self, key: PageKey, into: memoryview) -> Lineage:
        """Fill `into` with the page, and say what it is.

        `CorruptFile` where it is not whole; `into` then holds anything.
        """
        header, tail = bytearray(_HEADER.size), bytearray(_DIGEST_BYTES + 1)
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                sizes = [_read_all(file.fileno(), memoryview(part)) for part in (header, into, tail)]
        except FileNotFoundError as error:
            raise CorruptFile(f"the file of {key.hex()} is gone") from error
        if sizes != [_HEADER.size, self._page_bytes, _DIGEST_BYTES]:
            raise CorruptFile(f"the file of {key.hex()} has {sum(sizes)} bytes, not {self.file_bytes}")
        digest = blake2b(header, digest_size=_DIGEST_BYTES)
        digest.update(into)
        if digest.digest() != tail[:_DIGEST_BYTES] or (lineage := self._lineage(bytes(header))).key != key:
            raise CorruptFile(f"the file of {key.hex()} does not match its digest")
        return lineage

    def touch(self, key: PageKey, stamp_ns: int) -> None:
        """Note the time of a page's last use, for the scan after a restart."""
        with suppress(FileNotFoundError):
            os.utime(self._path(key), ns=(stamp_ns, stamp_ns))

    def remove(self, key: PageKey) -> None:
        """The page is kept no more."""
        self._path(key).unlink(missing_ok=True)

    def scan(self) -> tuple[list[Lineage], int]:
        """What an earlier process left, that used longest ago first; and how many files were none of ours, deleted.

        Reads headers only: bytes are checked when a page is wanted.
        """
        found: list[tuple[int, Lineage]] = []
        dropped = 0
        for path in self._files():
            try:
                found.append(self._look(path))
            except (CorruptFile, FileNotFoundError):
                dropped += path.suffix == _SUFFIX  # an unfinished one was never a page
                path.unlink(missing_ok=True)
        found.sort(key=lambda entry: entry[0])
        return [lineage for _, lineage in found], dropped

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    def _path(self, key: PageKey) -> Path:
        name = key.hex()
        return self._folder / name[:2] / (name + _SUFFIX)

    def _files(self) -> Iterator[Path]:
        for folder in self._folder.iterdir():
            if folder.is_dir() and len(folder.name) == 2:
                yield from (path for path in folder.iterdir() if path.suffix in (_SUFFIX, _UNFINISHED))

    def _look(self, path: Path) -> tuple[int, Lineage]:
        """When it was last used, and what it is by its header."""
        with open(path, "rb", buffering=0) as file:
            info = os.fstat(file.fileno())
            lineage = self._lineage(file.read(_HEADER.size))
        if info.st_size != self.file_bytes or path != self._path(lineage.key):
            raise CorruptFile(f"{path} is not whole")
        return info.st_mtime_ns, lineage

    def _header(self, lineage: Lineage) -> bytes:
        keys = (lineage.key, lineage.family, lineage.parent or _NO_PARENT)
        return _HEADER.pack(_MAGIC, _VERSION, self._page_bytes, self._format, *keys, lineage.checksum)

    def _lineage(self, header: bytes) -> Lineage:
        if len(header) != _HEADER.size:
            raise CorruptFile("the header is cut short")
        *what, key, family, parent, checksum = _HEADER.unpack(header)
        if what != [_MAGIC, _VERSION, self._page_bytes, self._format]:
            raise CorruptFile("the header is of another format")
        before = None if parent == _NO_PARENT else PageKey(parent)
        return Lineage(PageKey(key), PageKey(family), before, checksum)


def _digest_of(page_format: PageFormat) -> bytes:
    """16 bytes that name the format."""
    return blake2b(repr((*page_format.shape, page_format.dtype)).encode(), digest_size=16).digest()


def _keep_private(folder: Path) -> None:
    """Close a folder from before to others. `PermissionError` where it is another user's, who could open it again."""
    info = folder.stat()
    if info.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user")
    if stat.S_IMODE(info.st_mode) != _PRIVATE:
        folder.chmod(_PRIVATE)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _read_all(fd: int, into: memoryview) -> int:
    """Bytes read; fewer than there is room for at the file's end only."""
    done = 0
    while done < len(into) and (count := os.readv(fd, [into[done:]])):
        done += count
    return done

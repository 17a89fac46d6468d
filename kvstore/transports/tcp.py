"""Pages through a TCP connection: between any two hosts.

    request  magic, count, incarnation | count * (page, generation)
    reply    magic, status             | count * page bytes | count * generation    (all after status: OK only)

All numbers are little-endian. A request for no pages asks only whether this life is there. Page bytes go from the
owner's segment to the socket and from the socket to the reader's segment, with no copy in Python. The owner reads the
generations after the kernel has taken the bytes.
"""

import logging
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.pool import PageId
from kvstore.segment import Segment
from kvstore.transports.base import STAGE, PageReader, PageRef, PageServer
from protos import errors
from protos.v1 import worker_pb2

NAME = "tcp"
MAX_PAGES = 4096  # in one request
MAX_CONNECTIONS = 256  # one for each reader
_REQUEST = struct.Struct("<4sIQ")
_REPLY = struct.Struct("<4sI")
_MAGIC = b"dpt1"
_OK, _ANOTHER_LIFE, _STALE = range(3)
_REF = struct.Struct("<QQ")  # page, generation
_GENERATION_BYTES = 8
_CONNECT_S = 2.0
_REQUEST_S = 5.0  # for a request to arrive, once it has begun
_STALL_S = 10.0  # for a reader that takes nothing
_MAX_BUFFERS = 512  # in one sendmsg; Linux takes 1024
Numbers = NDArray[Any]
log = logging.getLogger(__name__)


class TcpServer(PageServer):
    """Answers readers, one thread for each. Bytes that are no request close their connection and nothing else.

    Binds a free port of `host`, which must be an address that readers can reach; `FixTheSetup` where it cannot.
    """

    def __init__(self, segment: Segment, host: str) -> None:
        self._segment = segment
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closed = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=128)
        except OSError as error:
            raise errors.FixTheSetup(f"cannot listen on {host}: {error.strerror}", stage="start") from error
        port = self._listener.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.endpoint = worker_pb2.Endpoint(transport=NAME, address=address)
        self._acceptor = threading.Thread(target=self._accept, name="tcp-pages", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections = list(self._connections.items())
        _shut(self._listener)  # wakes whoever waits in accept, recv or send
        for connection, _ in connections:
            _shut(connection)
        for thread in (self._acceptor, *(thread for _, thread in connections)):
            thread.join(_STALL_S)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closed:
                    log.warning("cannot accept a reader: %s", error)
                    time.sleep(0.1)  # out of descriptors, most likely: let some close
                continue
            self._start(connection)

    def _start(self, connection: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(connection,), name="tcp-pages", daemon=True)
        with self._lock:
            if self._closed or len(self._connections) >= MAX_CONNECTIONS:
                connection.close()
                return
            self._connections[connection] = thread
        thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            _configure(connection)
            first_by: float | None = time.monotonic() + _REQUEST_S
            while self._answer(connection, first_by):
                first_by = None  # a reader may be quiet for long: keepalive tells when its host is gone
        except OSError as error:
            log.info("a reader's connection ended: %s", error)
        finally:
            with self._lock:
                del self._connections[connection]
            connection.close()

    def _answer(self, connection: socket.socket, by: float | None) -> bool:
        """Serve one request, of which the first byte must come `by` then. False: the connection is to be closed."""
        head = memoryview(bytearray(_REQUEST.size))
        connection.settimeout(None if by is None else max(by - time.monotonic(), 0.001))
        received = connection.recv_into(head)
        if received == 0:
            return False
        deadline = time.monotonic() + _REQUEST_S
        _receive(connection, head[received:], deadline)
        magic, count, incarnation = _REQUEST.unpack(head)
        if magic != _MAGIC or count > MAX_PAGES:
            log.warning("closed a connection: its %d first bytes are no request", len(head))
            return False
        body = bytearray(count * _REF.size)
        _receive(connection, memoryview(body), deadline)
        refs = np.frombuffer(body, "<u8").reshape(count, 2)
        connection.settimeout(_STALL_S)
        if incarnation != self._segment.incarnation:
            _send(connection, [_REPLY.pack(_MAGIC, _ANOTHER_LIFE)])
        else:
            self._send_pages(connection, refs[:, 0], refs[:, 1])
        return True

    def _send_pages(self, connection: socket.socket, pages: Numbers, wanted: Numbers) -> None:
        # Who cannot name a page as it is now gets none of its bytes. The fence is the reader's check after the copy.
        if (pages >= self._segment.num_pages).any() or (self._generations_of(pages) != wanted).any():
            _send(connection, [_REPLY.pack(_MAGIC, _STALE)])
            return
        _send(connection, [_REPLY.pack(_MAGIC, _OK), *(self._segment.pages[page].data for page in pages)])
        _send(connection, [self._generations_of(pages).tobytes()])

    def _generations_of(self, pages: Numbers) -> Numbers:
        return self._segment.generations[pages].astype("<u8")


class TcpReader(PageReader):
    """Keeps one connection to an owner.

    Raises `WorkerLost` where nobody answers at `address`, or another life does.
    """

    name = NAME

    def __init__(self, address: str, incarnation: int, segment: Segment) -> None:
        super().__init__(segment)
        self._address = address
        self._incarnation = incarnation
        host, _, port = address.rpartition(":")
        try:
            self._connection = socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S)
        except (OSError, ValueError) as error:
            raise errors.WorkerLost(f"{address}: {error}", stage=STAGE) from error
        _configure(self._connection)
        try:
            self._copy([], [], _CONNECT_S)
        except errors.DiptychError:
            self.close()
            raise

    def _copy(self, refs: Sequence[PageRef], into: Sequence[PageId], timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        found: list[int] = []
        try:
            for start in range(0, len(refs) or 1, MAX_PAGES):
                end = start + MAX_PAGES
                found += self._request(refs[start:end], into[start:end], deadline)
        except OSError as error:
            reason = f"no answer in {timeout_s} s" if isinstance(error, TimeoutError) else str(error)
            raise errors.WorkerLost(f"{self._address}: {reason}", stage=STAGE) from error
        return found

    def _request(self, refs: Sequence[PageRef], into: Sequence[PageId], deadline: float) -> list[int]:
        head = _REQUEST.pack(_MAGIC, len(refs), self._incarnation)
        body = b"".join(_REF.pack(page, generation) for page, generation in refs)
        self._connection.settimeout(_left(deadline))
        self._connection.sendall(head + body)
        self._check_reply(deadline)
        for local in into:
            _receive(self._connection, self._segment.pages[local].data, deadline)
        generations = bytearray(len(refs) * _GENERATION_BYTES)
        _receive(self._connection, memoryview(generations), deadline)
        found: list[int] = np.frombuffer(generations, "<u8").tolist()
        return found

    def _check_reply(self, deadline: float) -> None:
        reply = bytearray(_REPLY.size)
        _receive(self._connection, memoryview(reply), deadline)
        magic, status = _REPLY.unpack(reply)
        if magic != _MAGIC or status not in (_OK, _STALE):
            raise errors.WorkerLost(f"{self._address} is not this life of the worker", stage=STAGE)
        if status == _STALE:
            raise errors.StalePage(f"{self._address}: a page was freed before it was asked for", stage=STAGE)

    def close(self) -> None:
        self._connection.close()


def _configure(connection: socket.socket) -> None:
    """No waiting for more to send; a host that has vanished is noticed after 15 s, in silence too."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time is up")
    return left


def _receive(connection: socket.socket, into: memoryview, deadline: float) -> None:
    while into:
        connection.settimeout(_left(deadline))
        received = connection.recv_into(into)
        if received == 0:
            raise ConnectionResetError("the other end closed the connection")
        into = into[received:]


def _send(connection: socket.socket, buffers: Sequence[bytes | memoryview]) -> None:
    queue = deque(memoryview(buffer) for buffer in buffers)
    while queue:
        sent = connection.sendmsg(list(islice(queue, _MAX_BUFFERS)))
        while queue and sent >= len(queue[0]):
            sent -= len(queue.popleft())
        if sent:
            queue[0] = queue[0][sent:]


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it may be closed already
        connection.shutdown(socket.SHUT_RDWR)

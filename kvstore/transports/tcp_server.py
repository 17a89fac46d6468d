"""The owner's end of the tcp transport.

Page bytes go from the pool to the socket with no copy in Python. The generations are read after the kernel has taken
the bytes.
"""

import logging
import socket
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.segment_base import SegmentBase
from kvstore.transports import tcp_wire as wire
from kvstore.transports.base import PageServer
from kvstore.transports.host_window import HostWindow, open_window
from protos import errors
from protos.v1 import worker_pb2

NAME = "tcp"
MAX_CONNECTIONS = 1024  # a few for each reader
_REQUEST_S = 5.0  # for a request to arrive, once it has begun
_STALL_S = 10.0  # for a reader that takes nothing
Numbers = NDArray[Any]
log = logging.getLogger(__name__)


class TcpServer(PageServer):
    """Answers readers, one thread for each connection. Bytes that are no request close theirs and nothing else.

    Binds a free port of `host`, which must be an address that readers can reach; `FixTheSetup` where it cannot.
    """

    def __init__(self, segment: SegmentBase, host: str) -> None:
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
        wire.shut(self._listener)
        for connection, _ in connections:
            wire.shut(connection)
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
            wire.configure(connection)
            first_by: float | None = time.monotonic() + _REQUEST_S
            window: HostWindow | None = None
            while (refs := self._take_request(connection, first_by)) is not None:
                first_by = None  # a reader may be quiet for long: keepalive tells when its host is gone
                if len(refs):
                    window = window or open_window(self._segment)  # only for who is a reader: it may take memory
                    self._send_pages(connection, window, refs[:, 0], refs[:, 1])
        except (OSError, errors.DiptychError) as error:
            log.info("a reader's connection ended: %s", error)
        finally:
            with self._lock:
                del self._connections[connection]
            connection.close()

    def _take_request(self, connection: socket.socket, by: float | None) -> Numbers | None:
        """What is asked for, [count, 2 (page, generation)]; its first byte must come `by` then. None: end of service.

        A request for no pages is answered here.
        """
        head = memoryview(bytearray(wire.REQUEST.size))
        connection.settimeout(None if by is None else max(by - time.monotonic(), 0.001))
        received = connection.recv_into(head)
        if received == 0:
            return None
        deadline = time.monotonic() + _REQUEST_S
        wire.receive(connection, head[received:], deadline)
        magic, count, incarnation = wire.REQUEST.unpack(head)
        if magic != wire.MAGIC or count > wire.MAX_PAGES:
            log.warning("closed a connection: its %d first bytes are no request", len(head))
            return None
        body = bytearray(count * wire.REF.size)
        wire.receive(connection, memoryview(body), deadline)
        connection.settimeout(_STALL_S)
        if incarnation != self._segment.incarnation:
            wire.send(connection, [wire.REPLY.pack(wire.MAGIC, wire.ANOTHER_LIFE)])
            return None
        if count == 0:
            wire.send(connection, [wire.REPLY.pack(wire.MAGIC, wire.OK)])
        return np.frombuffer(body, "<u8").reshape(count, 2)

    def _send_pages(self, connection: socket.socket, window: HostWindow, pages: Numbers, wanted: Numbers) -> None:
        # Who cannot name a page as it is now gets none of its bytes. The fence is the reader's check after the copy.
        if (pages >= self._segment.num_pages).any() or (self._generations_of(pages) != wanted).any():
            wire.send(connection, [wire.REPLY.pack(wire.MAGIC, wire.STALE)])
            return
        head = wire.REPLY.pack(wire.MAGIC, wire.OK)
        for start in range(0, len(pages), window.most):
            wire.send(connection, [head, *window.read(pages[start : start + window.most].tolist())])
            head = b""
        wire.send(connection, [self._generations_of(pages).tobytes()])

    def _generations_of(self, pages: Numbers) -> Numbers:
        return self._segment.generations[pages].astype("<u8")

"""What both ends of the tcp transport agree on, and their dealings with sockets.

    request  magic, count, incarnation | count * (page, generation)
    reply    magic, status             | count * page bytes | count * generation    (all after status: OK only)

All numbers are little-endian. A request for no pages asks only whether this life is there.
"""

import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

MAGIC = b"dpt1"
REQUEST = struct.Struct("<4sIQ")
REPLY = struct.Struct("<4sI")
REF = struct.Struct("<QQ")  # page, generation
GENERATION_BYTES = 8
OK, ANOTHER_LIFE, STALE = range(3)
MAX_PAGES = 4096  # in one request
_MAX_BUFFERS = 512  # in one sendmsg; Linux takes 1024


def configure(connection: socket.socket) -> None:
    """No waiting for more to send; a host that has vanished is noticed after 15 s, in silence too."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def left(deadline: float) -> float:
    """Seconds; `TimeoutError` where there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the time is up")
    return seconds


def receive(connection: socket.socket, into: memoryview, deadline: float) -> None:
    """Fill `into`."""
    while into:
        connection.settimeout(left(deadline))
        received = connection.recv_into(into)
        if received == 0:
            raise ConnectionResetError("the other end closed the connection")
        into = into[received:]


def send(connection: socket.socket, buffers: Sequence[bytes | memoryview]) -> None:
    """All of them, each write within the connection's timeout."""
    queue = deque(memoryview(buffer) for buffer in buffers)
    while queue:
        sent = connection.sendmsg(list(islice(queue, _MAX_BUFFERS)))
        while queue and sent >= len(queue[0]):
            sent -= len(queue.popleft())
        if sent:
            queue[0] = queue[0][sent:]


def shut(connection: socket.socket) -> None:
    """Wake whoever waits in accept, recv or send."""
    with suppress(OSError):  # it may be closed already
        connection.shutdown(socket.SHUT_RDWR)

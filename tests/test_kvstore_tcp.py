"""The tcp transport against peers that misbehave."""

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from kvstore.segment import Segment
from kvstore.transports import tcp, tcp_server, tcp_wire
from kvstore.transports.tcp import TcpReader, TcpServer
from kvstore_owner import INCARNATION, SMALL, Owner
from protos import errors

PATIENCE_S = 20.0


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(SMALL, 8, INCARNATION)
    segment.pages[:] = 7
    yield segment
    segment.close()


@pytest.fixture
def server(segment: Segment) -> Iterator[TcpServer]:
    server = TcpServer(segment, "127.0.0.1")
    yield server
    server.close()


@pytest.fixture
def local() -> Iterator[Segment]:
    segment = Segment.create(SMALL, 8, incarnation=1)
    yield segment
    segment.close()


@pytest.fixture
def reader(server: TcpServer, local: Segment) -> Iterator[TcpReader]:
    reader = TcpReader(server.endpoint.address, INCARNATION, local)
    yield reader
    reader.close()


def stranger(server: TcpServer) -> socket.socket:
    host, port = server.endpoint.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), PATIENCE_S)


def is_closed(connection: socket.socket) -> bool:
    """Waits until the server closes the connection; False where it sends something instead."""
    connection.settimeout(PATIENCE_S)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def works(reader: TcpReader, local: Segment) -> bool:
    local.pages[:] = 0
    reader.pull([(3, 0)], [5], PATIENCE_S)
    return bool((local.pages[5] == 7).all())


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(4096),
        os.urandom(100_000),
        struct.pack("<4sIQ", b"dpt1", tcp_wire.MAX_PAGES + 1, INCARNATION),
        struct.pack("<4sIQ", b"dpt1", 2**32 - 1, INCARNATION) + bytes(65536),
    ],
    ids=["http", "zeros", "noise", "too many", "far too many"],
)
def test_bytes_that_are_no_request_end_their_connection_and_nothing_else(server, reader, local, said):
    with stranger(server) as connection:
        with suppress(ConnectionError):  # it may be closed before it has taken everything
            connection.sendall(said)
        assert is_closed(connection)
        assert works(reader, local)


def test_a_request_cut_short_harms_nobody(server, reader, local):
    with stranger(server) as connection:
        connection.sendall(struct.pack("<4sIQ", b"dpt1", 3, INCARNATION) + bytes(5))
    assert works(reader, local)


def test_one_who_says_nothing_or_never_ends_is_not_waited_for(segment, local, monkeypatch):
    monkeypatch.setattr(tcp_server, "_REQUEST_S", 0.1)
    server = TcpServer(segment, "127.0.0.1")
    with stranger(server) as silent, stranger(server) as slow:
        slow.sendall(b"dpt1")
        assert is_closed(silent)
        assert is_closed(slow)
    server.close()


def test_one_who_takes_nothing_is_not_waited_for(segment, local, monkeypatch):
    monkeypatch.setattr(tcp_server, "_STALL_S", 0.2)
    server = TcpServer(segment, "127.0.0.1")
    with stranger(server) as greedy:
        request = struct.pack("<4sIQ", b"dpt1", 4096, INCARNATION) + bytes(16 * 4096)
        greedy.sendall(request)  # 16 MiB: more than the kernel keeps for it
        assert greedy.recv(8) == struct.pack("<4sI", b"dpt1", 0)
        deadline = time.monotonic() + PATIENCE_S
        while server._connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server._connections
    server.close()


def test_a_reader_may_be_quiet_for_longer_than_a_request_may_take(segment, local, monkeypatch):
    monkeypatch.setattr(tcp_server, "_REQUEST_S", 0.1)
    server = TcpServer(segment, "127.0.0.1")
    reader = TcpReader(server.endpoint.address, INCARNATION, local)
    time.sleep(0.3)
    assert works(reader, local)
    reader.close()
    server.close()


def test_connections_are_bounded(segment, local, monkeypatch):
    monkeypatch.setattr(tcp_server, "MAX_CONNECTIONS", 1)
    server = TcpServer(segment, "127.0.0.1")
    reader = TcpReader(server.endpoint.address, INCARNATION, local)
    with stranger(server) as one_too_many:
        assert is_closed(one_too_many)
    assert works(reader, local)
    reader.close()
    server.close()


def test_a_pull_of_more_pages_than_a_request_holds(server, reader, local, segment, monkeypatch):
    monkeypatch.setattr(tcp_wire, "MAX_PAGES", 3)
    segment.pages[:] = [[value] * SMALL.page_bytes for value in range(8)]
    assert reader.pull([(page, 0) for page in range(8)], list(range(7, -1, -1)), PATIENCE_S) == 8 * SMALL.page_bytes
    assert local.pages[:, 0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.fixture
def four_streams(monkeypatch) -> None:
    monkeypatch.setattr(tcp, "_STREAM_BYTES", 1)


@pytest.mark.parametrize("count", range(1, 9))
def test_streams_share_the_pages_of_a_pull(server, reader, local, segment, four_streams, count):
    segment.pages[:] = [[value] * SMALL.page_bytes for value in range(1, 9)]
    local.pages[:] = 0
    reader.pull([(page, 0) for page in range(count)], list(range(7, 7 - count, -1)), PATIENCE_S)
    assert local.pages[:, 0].tolist() == [0] * (8 - count) + list(range(count, 0, -1))
    assert len(reader._streams) == min(count, tcp.STREAMS)


@pytest.mark.parametrize("freed", [0, 3, 7])
def test_a_stale_page_in_one_stream_leaves_all_streams_usable(reader, local, segment, four_streams, freed):
    refs = [(page, 0) for page in range(8)]
    segment.generations[freed] += 1
    with pytest.raises(errors.StalePage):
        reader.pull(refs, list(range(8)), PATIENCE_S)
    segment.generations[freed] -= 1
    local.pages[:] = 0
    reader.pull(refs, list(range(8)), PATIENCE_S)
    assert (local.pages == 7).all()


def test_when_one_stream_breaks_the_others_are_not_waited_for(server, reader, local, four_streams, monkeypatch):
    """And nobody writes into the local pages any more when the pull has raised."""
    go_on = threading.Event()

    def send_pages(self, connection, window, pages, wanted) -> None:
        if 0 in pages:
            raise ConnectionResetError("cut")
        go_on.wait(PATIENCE_S)
        wire_send_pages(self, connection, window, pages, wanted)

    wire_send_pages = TcpServer._send_pages
    monkeypatch.setattr(TcpServer, "_send_pages", send_pages)
    local.pages[:] = 0
    started = time.monotonic()
    with pytest.raises(errors.WorkerLost):
        reader.pull([(page, 0) for page in range(8)], list(range(8)), PATIENCE_S)
    assert time.monotonic() - started < PATIENCE_S / 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tcp-pull")]
    go_on.set()
    assert not local.pages.any()


def test_a_page_freed_before_it_was_asked_for_is_not_sent(server, reader, local, segment):
    segment.generations[3] += 1
    local.pages[:] = 0
    with pytest.raises(errors.StalePage, match="before it was asked for"):
        reader.pull([(2, 0), (3, 0)], [0, 1], PATIENCE_S)
    assert not local.pages[1].any()


def test_several_readers_at_once(server, segment):
    def pull_much() -> None:
        local = Segment.create(SMALL, 8, incarnation=1)
        reader = TcpReader(server.endpoint.address, INCARNATION, local)
        for _ in range(50):
            right.append(works(reader, local))
        reader.close()
        local.close()

    right: list[bool] = []
    threads = [threading.Thread(target=pull_much) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 200


def test_a_closed_server_has_no_threads_and_its_readers_are_told(server, reader):
    server.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "tcp-pages"]
    with pytest.raises(errors.WorkerLost):
        reader.pull([(0, 0)], [0], PATIENCE_S)
    with pytest.raises(ConnectionRefusedError):
        stranger(server)


def test_an_owner_that_does_not_move_is_lost_when_the_time_is_up(local):
    with Owner() as owner:
        refs = owner.fill(1)
        reader = TcpReader(owner.endpoints["tcp"], INCARNATION, local)
        owner.freeze()
        with pytest.raises(errors.WorkerLost, match=r"no answer in 0\.3 s"):
            reader.pull(refs, [0], 0.3)


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"dpt1\x09\x00\x00\x00", b""])
def test_a_stranger_behind_the_address_is_a_worker_lost(local, said):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(errors.WorkerLost):
            TcpReader(f"127.0.0.1:{listener.getsockname()[1]}", INCARNATION, local)
        thread.join()


def test_ipv6(segment, local):
    try:
        server = TcpServer(segment, "::1")
    except errors.FixTheSetup:
        pytest.skip("no IPv6 here")
    assert server.endpoint.address.startswith("[::1]:")
    reader = TcpReader(server.endpoint.address, INCARNATION, local)
    assert works(reader, local)
    reader.close()
    server.close()

"""The embedded metadata server: it answers, keeps its password to itself, and is gone when it should be."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore.valkey import EmbeddedValkey
from protos import errors

PARENT = """
import sys, time
from kvstore.valkey import EmbeddedValkey
server = EmbeddedValkey()
server.start()
print(server.pid, server.url, flush=True)
time.sleep(600)
"""


ONCE = Retry(NoBackoff(), 0)


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=10, retry=ONCE)


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_it_answers_on_a_private_socket_until_it_is_stopped():
    server = EmbeddedValkey()
    server.start()
    folder = Path(urlsplit(server.url).path).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    with client(server.url) as connection:
        assert connection.ping()
        assert connection.config_get("port") == {"port": "0"}
    pid = server.pid
    server.stop()
    server.stop()
    assert ends(pid)
    assert not folder.exists()
    with pytest.raises(ValueError, match="not started"):
        _ = server.pid


def test_it_starts_again_empty_at_the_same_address():
    with EmbeddedValkey() as server:
        with client(server.url) as connection:
            connection.set("a", "b")
        url = server.url
        server.stop()
        server.start()
        assert server.url == url
        with client(url) as connection:
            assert connection.dbsize() == 0


def test_by_host_it_wants_the_password_and_shows_it_to_nobody():
    password = "p:/#%@ \"'\\ ä"
    with EmbeddedValkey("127.0.0.1", password=password) as server:
        with client(server.url) as connection:
            assert connection.ping()
        port = urlsplit(server.url).port
        with (
            redis.Redis(port=port, password="wrong", retry=ONCE) as connection,
            pytest.raises(redis.AuthenticationError),
        ):
            connection.ping()
        with redis.Redis(port=port, retry=ONCE) as connection, pytest.raises(redis.AuthenticationError):
            connection.ping()
        command = Path(f"/proc/{server.pid}/cmdline").read_bytes() + Path(f"/proc/{server.pid}/environ").read_bytes()
        assert password.encode() not in command


def test_a_password_is_drawn_where_none_is_given():
    one, other = EmbeddedValkey("127.0.0.1"), EmbeddedValkey("127.0.0.1")
    passwords = {urlsplit(server.url).password for server in (one, other)}
    assert len(passwords) == 2
    assert all(len(password or "") >= 24 for password in passwords)


def test_a_taken_port_is_a_typed_error_even_if_the_other_one_answers():
    with EmbeddedValkey("127.0.0.1", password="same") as first:
        second = EmbeddedValkey("127.0.0.1", urlsplit(first.url).port or 0, password="same")
        with pytest.raises(errors.PortTaken):
            second.start()
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(errors.PortTaken):
        EmbeddedValkey("127.0.0.1", listener.getsockname()[1]).start(deadline_s=5)


def test_a_host_that_is_not_ours_is_a_typed_error():
    with pytest.raises(errors.FixTheSetup, match="cannot listen on"):
        EmbeddedValkey("192.0.2.1")
    with pytest.raises(errors.FixTheSetup, match="ended at once"):
        EmbeddedValkey("192.0.2.1", 6399).start()


def test_it_outlives_the_thread_that_started_it():
    server = EmbeddedValkey()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    time.sleep(0.2)
    with client(server.url) as connection:
        assert connection.ping()
    server.stop()


def test_it_ends_with_a_parent_that_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().split()
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert ends(int(pid))
    folder = Path(urlsplit(url).path).parent
    for left in folder.glob("*"):
        left.unlink()
    folder.rmdir()

"""What `make soak` rests on: its judgement of answers, and connections that it can cut and slow."""

import asyncio
import time

import pytest

from soak.proxy import Proxy
from soak.tally import Tally

CLEAN = (5, 6, 7, 8)


@pytest.mark.parametrize(
    ("got", "whole", "right"),
    [
        (CLEAN, True, True),
        (CLEAN[:2], False, True),  # broken off
        ((), False, True),
        (CLEAN[:2], True, False),  # a token lost
        ((5, 6, 6, 7), False, False),  # one twice
        ((*CLEAN, 9), False, False),
        ((5, 9), False, False),
    ],
)
def test_an_answer_is_its_clean_one_or_the_beginning_of_it(got, whole, right):
    tally = Tally()
    tally.check(CLEAN, got, whole, "r")
    assert bool(tally.wrong) is not right


def test_only_an_error_without_a_type_is_untyped():
    tally = Tally()
    tally.outcomes.update({"answered": 3, "worker_lost (decode)": 2, "internal (decode)": 1})
    assert (tally.requests, tally.untyped) == (6, 1)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


async def test_a_proxy_passes_on_slows_and_cuts():
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy()
    await proxy.start()
    host, port = proxy.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await reader.read(1) == b"", "nobody is behind it yet"
    writer.close()
    proxy.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    proxy.delay_s = 0.1
    started = time.monotonic()
    writer.write(b"again")
    assert await reader.readexactly(5) == b"again"
    assert time.monotonic() - started >= 0.2
    assert proxy.cut() == 1
    assert await reader.read(1) == b""
    writer.close()
    await proxy.stop()
    server.close()

"""`serve_one.py` for the soak test: a worker behind proxies, whose pulls are slow at times, perhaps with a bug."""

import random
import time
from dataclasses import replace

import serve_one


async def serve(kind: str, settings: dict) -> None:
    """`settings["soak"]` has `service` and `pages`, the proxies' addresses, `slow` (s), and `planted`, a bug's name."""
    soak = settings.pop("soak", None)
    said = {} if soak is None else _stand_behind(soak["service"], soak["pages"])
    if soak is not None:
        _slow_pulls(soak["slow"])
        if soak["planted"] == "fence":
            _remove_the_fence()
    service = await serve_one.start(kind, settings)
    await serve_one.stay(service, **said)


def _stand_behind(service: str, pages: str) -> dict[str, str]:
    """Tell others the proxies' addresses; the own one for pages is in what is returned, once it is known."""
    from kvstore.transports.tcp_server import TcpServer
    from worker.host import WorkerHost

    said: dict[str, str] = {}
    record, listen = WorkerHost._record, TcpServer.__init__

    def init(self, *arguments) -> None:
        listen(self, *arguments)
        said["pages"] = self.endpoint.address
        self.endpoint.address = pages

    WorkerHost._record = lambda self: replace(record(self), address=service)
    TcpServer.__init__ = init
    return said


def _slow_pulls(most_s: float) -> None:
    """One pull in eight begins late, as if the network were busy."""
    from kvstore.transports.base import PageReader

    pull, rng = PageReader.pull, random.Random()

    def slow(self, *arguments, **named) -> int:
        if rng.random() < 1 / 8:
            time.sleep(rng.random() * most_s)
        return pull(self, *arguments, **named)

    PageReader.pull = slow


def _remove_the_fence() -> None:
    """The planted bug: nobody compares generations any more."""
    from kvstore.transports import base
    from kvstore.transports.tcp_server import TcpServer

    send = TcpServer._send_pages
    base.check_generations = lambda refs, found: None
    TcpServer._send_pages = lambda self, connection, window, pages, wanted: send(
        self, connection, window, pages, self._generations_of(pages)
    )


if __name__ == "__main__":
    serve_one.main(serve)

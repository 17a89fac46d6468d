"""A TCP connection that can be cut and slowed."""

import asyncio
from contextlib import suppress

CHUNK = 16384  # bytes passed on at a time


class Proxy:
    """Stands at `address` for a `target` that may change, or be nobody: then it hangs up."""

    def __init__(self) -> None:
        self.target = ""
        self.delay_s = 0.0  # before each chunk, either way
        self.address = ""
        self._server: asyncio.Server | None = None
        self._streams: dict[asyncio.StreamWriter, asyncio.Task] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> int:
        """Break every connection; how many there were."""
        count = len(self._streams) // 2
        for writer in self._streams:
            writer.transport.abort()
        return count

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        pumps = list(self._streams.values())
        self.cut()
        if pumps:
            await asyncio.wait(pumps)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            host, port = self.target.split(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except (OSError, ValueError):
            writer.transport.abort()
            return
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._streams[sink] = asyncio.create_task(self._pump(source, sink, (writer, far_writer)))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, both: tuple) -> None:
        try:
            with suppress(OSError):
                while data := await source.read(CHUNK):
                    if self.delay_s:
                        await asyncio.sleep(self.delay_s)
                    sink.write(data)
                    await sink.drain()
        finally:
            for writer in both:
                writer.transport.abort()  # an end of one direction is the end of both
            del self._streams[sink]

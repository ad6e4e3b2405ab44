"""A TCP proxy on loopback that breaks connections the way networks do."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Literal

from tests.patience import PATIENCE_SECONDS

Mode = Literal["pass", "swallow", "cut"]


class FaultProxy:
    """Between a client and one server.

    `mode`: `pass`; `swallow` (nothing comes back, connections stay open: half-open); `cut` (the next answer breaks its
    connection instead, once, after the server has done what was asked). `delay_seconds` slows every answer down.
    """

    def __init__(self, port: int) -> None:
        self.mode: Mode = "pass"
        self.delay_seconds = 0.0
        self.num_cut = 0
        self._server_port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
            ends = [
                asyncio.create_task(self._copy(reader, up_writer, is_answer=False)),
                asyncio.create_task(self._copy(up_reader, writer, is_answer=True)),
            ]
            self._tasks.update(ends)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                end.cancel()
            up_writer.transport.abort()
        writer.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if is_answer and self.mode == "cut":
                    self.mode = "pass"
                    self.num_cut += 1
                    return
                if is_answer and self.mode == "swallow":
                    continue
                if is_answer and self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                writer.write(data)
                await writer.drain()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FaultProxy]:
        """Listen for a block."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()


@contextlib.contextmanager
def proxied(port: int) -> Iterator[FaultProxy]:
    """Run one in a thread for a block, in front of a server on this port."""
    proxy, is_ready, end = FaultProxy(port), threading.Event(), threading.Event()

    async def main() -> None:
        async with proxy.running():
            is_ready.set()
            await asyncio.to_thread(end.wait)

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    try:
        assert is_ready.wait(PATIENCE_SECONDS), "the proxy does not listen"
        yield proxy
    finally:
        end.set()
        thread.join(PATIENCE_SECONDS)

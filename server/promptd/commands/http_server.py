"""One uvicorn server around the application, which leaves its load balancer before it closes the door."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from promptd.commands.launch import STOP_SIGNALS, on_first_signal
from promptd.connections import http_protocol, most_connections
from promptd.settings import Settings

KEEP_ALIVE_SECONDS = 75
"""Longer than load balancers keep idle connections, so that it is they who close them."""
FLUSH_SECONDS = 5
"""After the time to drain: for the last answers to reach their clients."""


class LeavingServer(uvicorn.Server):
    """Leaves at a signal: not ready, for a while still serving, then no longer listening, then gone.

    uvicorn alone closes the door first, and a load balancer goes on sending requests to it until its next check.
    """

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, leave_seconds: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._services = app.state.services
        self._leave_seconds = leave_seconds
        self._on_ready = on_ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave at the first one."""
        loop = asyncio.get_running_loop()

        def leave(which: signal.Signals) -> None:
            wanted = self._leave_seconds if which is signal.SIGTERM else 0.0  # a person at the terminal does not wait
            loop.call_later(self._services.leaving.end(wanted), setattr, self, "should_exit", True)

        on_first_signal(leave)
        try:
            yield
        finally:
            for one in STOP_SIGNALS:
                loop.remove_signal_handler(one)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; the engine ends what it cannot finish while the connections are still open to say so."""
        draining = asyncio.create_task(self._services.drain())
        await super().shutdown(sockets)
        await draining


@contextmanager
def lasting_heap() -> Iterator[None]:
    """For a block, collections of garbage do not walk what is there now: the model's and the libraries' objects.

    They are half a million, and a walk through them takes some tenths of a second in which nobody is answered.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def run_server(app: FastAPI, settings: Settings, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    """Start the application, serve until a signal comes, and end both in order."""
    config = uvicorn.Config(
        app,
        http=http_protocol(app.state.shedding, most_connections()),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + FLUSH_SECONDS,
    )
    async with app.router.lifespan_context(app):
        with lasting_heap():
            await LeavingServer(config, app, settings.leave_seconds, on_ready).serve(sockets=[listener])

"""Servers in a thread of the test's process, whose engine and budgets the test can look into."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from promptd.api.services import Services
from promptd.app import create_app
from promptd.connections import http_protocol
from promptd.settings import Settings
from tests.patience import PATIENCE_SECONDS, until

SEND_BUFFER = 16 << 10


class Site:
    """One running server."""

    def __init__(self, app: FastAPI, port: int) -> None:
        self.app = app
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    @property
    def services(self) -> Services:
        """What its routes work with."""
        services: Services = self.app.state.services
        return services

    @property
    def is_idle(self) -> bool:
        """Whether nothing of any request is left: no row, no block in use, no stream, nothing of any budget."""
        engine, budgets = self.services.engine, self.services.gate.budgets
        kinds = (budgets.requests, budgets.tokens, budgets.upload_bytes, budgets.event_streams)
        held = [one.reading() for one in kinds]
        is_free = all(one.used == 0 and one.num_tenants == 0 for one in held)
        return is_free and not engine.engine.has_work and not engine._streams and not engine.engine.blocks.num_used


@contextlib.contextmanager
def running(model: Path, folder: Path, *, max_connections: int = 1000, **settings: Any) -> Iterator[Site]:
    """Serve a model for a block, with small socket buffers: a reader that stops is noticed soon."""
    options: dict[str, Any] = {"training": "off", "drain_seconds": 1, "store": str(folder), **settings}
    app = create_app(Settings(model=str(model), **options))
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        protocol = http_protocol(app.state.shedding, max_connections)
        config = uvicorn.Config(app, log_config=None, lifespan="on", http=protocol)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            until(lambda: server.started, "the server starts")
            yield Site(app, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(timeout=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> Path:
    """The tiny Llama."""
    return tiny_models["llama"]

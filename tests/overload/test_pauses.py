"""What could hold up all requests at once."""

from __future__ import annotations

import asyncio
import gc
import socket
from pathlib import Path

import pytest

from promptd.app import create_app
from promptd.commands.http_server import LeavingServer, run_server
from promptd.settings import Settings


def test_a_full_collection_does_not_walk_what_serves(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the server serves, hardly an object from before is looked at; afterwards (the control) all are."""
    seen: list[tuple[int, int]] = []

    async def serve(server: LeavingServer, sockets: list[socket.socket]) -> None:
        seen.append((gc.get_freeze_count(), len(gc.get_objects())))

    monkeypatch.setattr(LeavingServer, "serve", serve)
    settings = Settings(model=str(model), store=str(tmp_path), training="off", drain_seconds=0)
    with socket.socket() as listener:
        asyncio.run(run_server(create_app(settings), settings, listener, lambda: None))
    ((num_frozen, num_walked),) = seen
    assert num_frozen > 10 * num_walked
    assert gc.get_freeze_count() == 0 and len(gc.get_objects()) > 10 * num_walked

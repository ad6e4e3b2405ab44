"""What could hold up all requests at once."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from promptd.app import create_app
from promptd.commands.http_server import LeavingServer, run_server
from promptd.settings import Settings
from tests.overload.conftest import running
from tests.overload.wire import ask


@pytest.fixture
def thawed() -> Iterator[None]:
    """For a test, what the session has frozen is walked again."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


def test_a_full_collection_does_not_walk_what_serves(
    model: Path, thawed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_the_first_request_finds_everything_made(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No validator of any route is made while it waits, and everybody with it."""
    made: list[object] = []
    make = TypeAdapter.__init__

    def making(adapter: TypeAdapter[object], type_: object, **options: object) -> None:
        made.append(type_)
        make(adapter, type_, **options)  # type: ignore[arg-type]

    with running(model, tmp_path) as site:
        monkeypatch.setattr(TypeAdapter, "__init__", making)
        body = {"model": "tiny-llama", "prompt": [5, 6], "max_tokens": 1}
        assert asyncio.run(ask(site.port, body)).status == 200
        assert made == []
        create_app(Settings(model=str(model), store=str(tmp_path), training="off"))
        assert len(made) > 100  # the control: that is when they are made

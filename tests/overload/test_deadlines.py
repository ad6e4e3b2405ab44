"""Deadlines hold also while the engine is stuck in a step: the event loop looks at them itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from promptd.commands.http_server import lasting_heap
from promptd.engine.engine import Engine
from tests.overload.conftest import Site, running
from tests.overload.wire import Reply, ask
from tests.patience import until

MODEL = "tiny-llama"
ASK = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}


@contextlib.contextmanager
def stuck(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a block, the engine's next step does not come to its end."""
    step, go_on = Engine.step, threading.Event()

    def waiting(engine: Engine) -> Any:
        go_on.wait(60)
        return step(engine)

    monkeypatch.setattr(Engine, "step", waiting)
    try:
        yield
    finally:
        monkeypatch.setattr(Engine, "step", step)
        go_on.set()


def ends(site: Site, body: dict[str, Any], count: int = 1) -> list[Reply]:
    """Ask so often at once."""

    async def main() -> list[Reply]:
        return await asyncio.gather(*(ask(site.port, body) for _ in range(count)))

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "status", "code"),
    [
        ({"max_queue_seconds": 0.3}, 503, "queue_timeout"),
        ({"max_first_token_seconds": 0.3}, 504, "first_token_deadline_exceeded"),
        ({"request_timeout_seconds": 0.3}, 504, "deadline_exceeded"),
    ],
)
def test_a_stuck_engine_does_not_keep_its_callers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, float], status: int, code: str
) -> None:
    """Each deadline, plain and streamed, is answered while the step still hangs; afterwards nothing is left."""
    with running(model, tmp_path, **settings) as site:
        with stuck(site, monkeypatch):
            (plain,) = ends(site, ASK)
            assert (plain.status, plain.code) == (status, code)
            if status == 503:
                assert plain.headers["retry-after"] == "1"
            (streamed,) = ends(site, {**ASK, "stream": True})
            assert streamed.status == 200 and f'"{code}"' in streamed.body.decode()
            late = sorted(one.seconds - 0.3 for one in (plain, streamed))
        until(lambda: site.is_idle, "the rows of the late are gone")
        print(json.dumps({"code": code, "seconds_after_the_deadline": [round(one, 3) for one in late]}))
        until(lambda: ends(site, {**ASK, "max_tokens": 1})[0].status == 200, "the same request in time")


@pytest.mark.long
def test_lateness(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 requests, 20 at once, each 0.5 s of waiting: told within 100 ms of the deadline."""
    with running(model, tmp_path, max_first_token_seconds=0.5) as site, lasting_heap():
        with stuck(site, monkeypatch):
            late = sorted(reply.seconds - 0.5 for _ in range(10) for reply in ends(site, ASK, 20))
        began = time.monotonic()
        until(lambda: site.is_idle, "the rows of the late are gone")
        print(json.dumps({"late_p50": late[100], "late_p99": late[198], "freed_s": time.monotonic() - began}))
    assert late[198] <= 0.1

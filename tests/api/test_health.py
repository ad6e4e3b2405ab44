"""Probes tell the truth: of an engine that stands still, of one that is slow, and of one that has nothing to do."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from promptd.api import health
from promptd.engine.runner import Answers, Made, Runner
from promptd.engine.schedule import Schedule
from tests.api.conftest import MODEL, LiveServer
from tests.patience import PATIENCE_SECONDS, until

SILENT_SECONDS, STALLED_SECONDS = 0.3, 3600.0


def test_an_engine_that_stands_still(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is out of its balancer first, and only much later to be restarted; both end with the step. Idle is healthy."""
    go_on, run = threading.Event(), Runner.run

    def stuck(runner: Runner, step: Schedule, made: Made | None = None) -> Answers:
        go_on.wait(PATIENCE_SECONDS)
        return run(runner, step, made)

    def ask() -> httpx.Response:
        with server.http() as http:
            return http.post("/v1/completions", json={"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 1})

    with server.http() as http, ThreadPoolExecutor(1) as pool:

        def status(probe: str) -> tuple[int, str]:
            answer = http.get(probe)
            return answer.status_code, answer.json()["status"]

        monkeypatch.setattr(health, "MAX_SILENT_SECONDS", SILENT_SECONDS)
        monkeypatch.setattr(health, "MAX_STALLED_SECONDS", STALLED_SECONDS)
        time.sleep(2 * SILENT_SECONDS)
        assert status("/readyz") == (200, "ok")
        monkeypatch.setattr(Runner, "run", stuck)
        answer = pool.submit(ask)
        try:
            until(lambda: status("/readyz") == (503, "stalled"))
            assert status("/livez") == (200, "ok")
            monkeypatch.setattr(health, "MAX_STALLED_SECONDS", SILENT_SECONDS)
            assert status("/livez") == (503, "stalled")
        finally:
            go_on.set()
        assert answer.result().status_code == 200
        assert [status(probe) for probe in ("/readyz", "/livez")] == [(200, "ok")] * 2
    monkeypatch.undo()
    assert health.MAX_SILENT_SECONDS == 10 < health.MAX_STALLED_SECONDS

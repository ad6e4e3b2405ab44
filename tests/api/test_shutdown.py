"""How requests end when the server does, or when their client does."""

from __future__ import annotations

import concurrent.futures
import json
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog

from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve
from tests.patience import PATIENCE_SECONDS, until
from tests.replicas import ReplicaForge, running_replicas

LONG = {"prompt": ["x"] * 15, "n": 8, "max_tokens": 200, "ignore_eos": True}


def test_sigterm_gives_every_request_its_end(forge: ReplicaForge, tmp_path: Path) -> None:
    """After the time to drain, a stream's last event and a plain answer are the typed error; the exit code is 0."""
    with running_replicas(forge, tmp_path, str(tmp_path / "store"), 1, drain_seconds=1) as (live,):
        with (
            httpx.Client(base_url=live.url, timeout=PATIENCE_SECONDS) as http,
            concurrent.futures.ThreadPoolExecutor(1) as pool,
            http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as streamed,
        ):
            plain = pool.submit(http.post, "/v1/completions", json=LONG)
            lines = streamed.iter_lines()
            assert next(lines).startswith("data: ")
            both_are_in = re.compile(r"^promptd_requests_waiting 2\d\d", re.MULTILINE)
            until(lambda: both_are_in.search(http.get("/metrics").text), pause_seconds=0.02)
            live.signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
            assert json.loads(events[-1])["error"]["code"] == "shutting_down"
            assert sum("error" in json.loads(event) for event in events) == 1
            answer = plain.result(timeout=PATIENCE_SECONDS)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert live.wait() == 0


@pytest.fixture(scope="module")
def hasty(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose requests may take one and a half seconds: a busy machine takes its time, too."""
    settings = Settings(
        model=str(tiny_models["llama"]),
        store=str(tmp_path_factory.mktemp("hasty")),
        request_timeout_seconds=1.5,
        drain_seconds=0,
    )
    with serve(settings, tiny_models["llama"]) as live:
        yield live


@pytest.mark.parametrize("start", ["PUT /v1/prompts/slow", "POST /v1/completions"])
def test_a_body_that_trickles_in_ends(hasty: LiveServer, start: str) -> None:
    """A client that opens a request and never ends its body is answered when its time is up."""
    url = httpx.URL(hasty.url)
    head = f"{start} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((url.host, url.port), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(head.encode() + b"{")
        answer = b""
        while b"}}" not in answer and (part := connection.recv(4096)):
            answer += part
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert b'"deadline_exceeded"' in answer


def test_an_upload_that_breaks_off_stores_nothing(hasty: LiveServer) -> None:
    """It is the client's doing: no prompt, and no alarm in the log."""
    url = httpx.URL(hasty.url)
    with (
        structlog.testing.capture_logs() as logged,
        socket.create_connection((url.host, url.port), timeout=PATIENCE_SECONDS) as connection,
    ):
        connection.sendall(b"PUT /v1/prompts/broken HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
        connection.close()
        until(lambda: [line for line in logged if line.get("path") == "/v1/prompts/broken"])
    ours = [line for line in logged if line.get("path") == "/v1/prompts/broken"]  # others' lines come late, too
    assert [(line["event"], line["status"]) for line in ours] == [("request", 499)]
    assert {line["log_level"] for line in logged} == {"info"}
    with hasty.http() as http:
        assert http.get("/v1/prompts/broken").status_code == 404

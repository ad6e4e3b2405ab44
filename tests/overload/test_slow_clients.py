"""Clients that stop in the middle: what they hold is freed, and what waits for them is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from promptd import connections
from promptd.api import downloads
from promptd.connections import AbortableHttp
from promptd.engine import stream as streams
from promptd.engine.async_engine import AsyncEngine
from promptd.engine.request import GenerateRequest, RequestOutput
from promptd.errors import SlowReaderError
from tests.engine.harness import greedy, make_engine
from tests.overload.conftest import Site, running
from tests.overload.wire import request_bytes
from tests.patience import until

MODEL = "tiny-llama"
LONG = {
    "model": MODEL, "prompt": [[5, 6, 7]] * 4, "max_tokens": 240, "ignore_eos": True, "stream": True, "logprobs": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server that waits half a second for its clients."""
    with running(model, tmp_path_factory.mktemp("slow"), stall_seconds=0.5) as site:
        yield site


def connect(site: Site) -> socket.socket:
    """A connection whose client keeps little for itself."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", site.port))
    return connection


def test_a_reader_that_stops_is_cut_off(site: Site) -> None:
    """Its rows go, its budget comes back, its connection is dropped; others are served meanwhile."""
    aborted = site.services.engine.stats().requests_aborted
    with connect(site) as connection:
        connection.sendall(request_bytes(LONG))
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        with httpx.Client(base_url=site.url, timeout=60) as http:
            assert http.post("/v1/completions", json={"model": MODEL, "prompt": [5], "max_tokens": 2}).is_success
        until(lambda: site.is_idle, "the reader's rows are gone")
        received = 0
        with pytest.raises(ConnectionResetError):  # not the end of an answer
            while piece := connection.recv(1 << 16):
                received += len(piece)
            raise AssertionError("the connection was closed in peace")
    assert received < 400_000  # of 2 MB: what lay in the buffers
    print({"bytes_in_buffers": received, "rows_ended": site.services.engine.stats().requests_aborted - aborted})


def test_a_reader_that_reads_on_is_not(site: Site) -> None:
    """Slowly is fine: everything comes, to [DONE]."""
    with httpx.Client(base_url=site.url, timeout=60) as http, http.stream("POST", "/v1/completions", json=LONG) as one:
        assert list(one.iter_lines())[-2] == "data: [DONE]"


def test_a_body_that_does_not_come(site: Site) -> None:
    """408 with the field's name, and nothing held."""
    with connect(site) as connection:
        connection.sendall(request_bytes(LONG)[:-10])
        answer = b""
        while b"}}" not in answer and (piece := connection.recv(1 << 16)):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408") and b'"client_too_slow"' in answer
    until(lambda: site.is_idle, "everything was given back")


def whole_answer(connection: socket.socket) -> bytes:
    """Read what /livez says: head and body may come apart."""
    answer = b""
    while not answer.endswith(b"}") and (part := connection.recv(1 << 16)):
        answer += part
    return answer


def test_headers_that_do_not_come(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off, the first request's and a later one's; one that is idle between two requests, or at work, is not."""
    with connect(site) as idle:
        idle.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert whole_answer(idle).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
        for beginning in (b"", b"GET /livez HTTP/1.1\r\nHost: local"):
            with connect(site) as connection:
                connection.sendall(beginning)
                with pytest.raises(ConnectionResetError):
                    connection.recv(1 << 16)
        with connect(site) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert whole_answer(connection).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /livez HTT")
            with pytest.raises(ConnectionResetError):
                while connection.recv(1 << 16):
                    pass
        idle.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert whole_answer(idle).startswith(b"HTTP/1.1 200")


def test_headers_without_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused when there are too many of them, and not when time is up."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1000.0)
    answer = b""
    with connect(site) as connection, contextlib.suppress(ConnectionError):  # what is sent to a closed one is reset
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Much: " + b"x" * (256 << 10))
        while part := connection.recv(1 << 16):
            answer += part
    assert not answer or answer.startswith(b"HTTP/1.1 400")


def test_what_waits_for_a_reader_is_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that nobody reads ends its row; what was made is still there, and then the reason. Once each."""
    monkeypatch.setattr(streams, "MAX_UNREAD", 8)
    monkeypatch.setattr(streams, "MAX_UNREAD_SECONDS", 0.0)

    async def main() -> None:
        engine = AsyncEngine(make_engine(model))
        engine.start()
        try:
            stream = engine.submit(GenerateRequest("a", (5, 6, 7), greedy(200)))
            async with asyncio.timeout(60):
                while engine.engine.has_work or not stream._outputs:  # noqa: ASYNC110 - nothing is read here
                    await asyncio.sleep(0.005)
            read = [await stream.next_output() for _ in range(8)]
            assert all(isinstance(one, RequestOutput) and one.token_ids for one in read)
            with pytest.raises(SlowReaderError):
                await stream.next_output()
            assert await stream.next_output() is None
            assert engine.stats().requests_aborted == 1
        finally:
            await engine.shutdown()

    asyncio.run(main())


def test_a_download_that_is_not_read_holds_a_piece(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 MB no more than a piece or two wait in the server, and files share one budget. The control: all in one."""
    transports: list[asyncio.WriteTransport] = []
    begin = AbortableHttp.connection_made

    def beginning(protocol: AbortableHttp, transport: asyncio.WriteTransport) -> None:
        transports.append(transport)
        begin(protocol, transport)

    monkeypatch.setattr(AbortableHttp, "connection_made", beginning)
    rows = b'{"text": "a", "label": "b"}\n' * 150_000
    with (
        running(model, tmp_path, max_open_upload_bytes=3 * len(rows)) as site,
        httpx.Client(base_url=site.url, timeout=60) as http,
    ):
        upload = {"files": {"file": ("rows.jsonl", rows)}, "data": {"purpose": "fine-tune"}}
        made = http.post("/v1/files", **upload).raise_for_status().json()  # type: ignore[arg-type]
        path = f"/v1/files/{made['id']}/content"
        assert http.get(path).content == rows
        sizes = []
        for piece in (downloads.PIECE_BYTES, 1 << 30):
            monkeypatch.setattr(downloads, "PIECE_BYTES", piece)
            with connect(site) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
                until(lambda: transports[-1].get_write_buffer_size() > 0, "it waits for its reader")
                sizes.append(transports[-1].get_write_buffer_size())
                with connect(site) as second:
                    second.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                    assert second.recv(100).startswith(b"HTTP/1.1 200")
                    refused = http.get(path)
                    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            until(lambda: site.is_idle, "everything was given back")
        assert http.get(path).content == rows
    assert sizes[0] <= 256 << 10 < 2 << 20 < sizes[1]

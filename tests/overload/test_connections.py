"""More connections than a server can have: those beyond are told so, probes are not, and it is well again with them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from promptd.connections import OnePiece, most_connections
from tests.overload.conftest import Site, running
from tests.patience import until
from tests.replicas import Replica, ReplicaForge

PROBE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
ASK = {"model": "tiny-llama", "prompt": [5, 6, 7], "max_tokens": 1}


@pytest.fixture
def site(model: Path, tmp_path: Path) -> Iterator[Site]:
    """A server with room for eight connections, and for one more to be told so."""
    with running(model, tmp_path, max_connections=8) as site:
        yield site


@contextlib.contextmanager
def idle(port: int, count: int) -> Iterator[list[socket.socket]]:
    """So many clients that have asked once and keep their connections."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            one.sendall(PROBE)
            answer = b""
            while not answer.endswith(b"}") and (part := one.recv(4096)):
                answer += part
            assert answer.startswith(b"HTTP/1.1 200"), answer
            made.append(one)
        yield made


def lives(http: httpx.Client) -> bool:
    """What a probe hears."""
    with contextlib.suppress(httpx.TransportError):
        return http.get("/livez").status_code == 200
    return False


def test_one_too_many(site: Site) -> None:
    """503 with Retry-After on the ninth, which ends with it; probes are answered; the tenth is cut off."""
    with idle(site.port, 8), httpx.Client(base_url=site.url, timeout=60) as ninth:
        refused = ninth.get("/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1 and refused.headers["connection"] == "close"
        assert refused.headers["x-request-id"]
        until(lambda: lives(ninth), "probes are answered")  # on another connection, once that one is closed
        with pytest.raises(httpx.TransportError), httpx.Client(base_url=site.url, timeout=60) as tenth:
            tenth.get("/livez")
    until(lambda: httpx.post(f"{site.url}/v1/completions", json=ASK, timeout=60).status_code == 200, "well again")


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the end."""
    came = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(4096):
            came += part
    return came


BODY = json.dumps(ASK).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
PLAIN = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([PLAIN], id="plain"),
        pytest.param([PLAIN[:30], PLAIN[30:]], id="its head in two"),
        pytest.param([PLAIN + PLAIN], id="two at once"),
        pytest.param([PROBE + PLAIN], id="behind a probe"),
        pytest.param([PROBE, PLAIN], id="behind a probe, later"),
        pytest.param([HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS], id="chunked"),
        pytest.param([PLAIN.replace(b"1.1", b"1.0", 1)], id="HTTP/1.0"),
        pytest.param([PLAIN.replace(b"POST", b"ABCDEF", 1)], id="no method"),
    ],
)
def test_nobody_slips_in(site: Site, pieces: list[bytes]) -> None:
    """However a request on one connection too many is written, it is not served, and the connection ends."""
    with idle(site.port, 8), socket.create_connection(("127.0.0.1", site.port), timeout=60) as ninth:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                ninth.sendall(piece)
                time.sleep(0.05)
        came = answer_of(ninth)
        assert came.count(b"HTTP/1.1 503 ") <= 1 and b"text_completion" not in came, came
        assert came.startswith((b"HTTP/1.1 503 ", b"HTTP/1.1 200 ")), came
        if not came.startswith(b"HTTP/1.1 503 "):
            assert pieces[0] is PROBE
    metrics = httpx.get(f"{site.url}/metrics", timeout=60).text
    assert "ABCDEF" not in metrics, "what clients send never becomes a label"


def test_the_head_alone(site: Site) -> None:
    """An answer to HEAD has no body, a refusal neither."""
    with idle(site.port, 8), socket.create_connection(("127.0.0.1", site.port), timeout=60) as ninth:
        ninth.sendall(b"HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        came = answer_of(ninth)
    assert came.startswith(b"HTTP/1.1 503 ") and came.endswith(b"\r\n\r\n")


def test_room_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server takes as many files as it may, and half of them are for connections."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    endless = resource.RLIM_INFINITY
    for (soft, hard), wanted, most in (
        ((1024, 4096), [(4096, 4096)], (4096 - 256) // 2),
        ((1024, endless), [(65536, endless)], (65536 - 256) // 2),
        ((1024, 1024), [], (1024 - 256) // 2),
        ((1_000_000, 1_000_000), [], (65536 - 256) // 2),
        ((64, 64), [], 16),
    ):
        asked.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda which, limits=(soft, hard): limits)
        assert (most_connections(), asked) == (most, wanted)


@contextlib.contextmanager
def files(count: int) -> Iterator[None]:
    """This process may have so many open for a block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < count:
        pytest.skip(f"{count} files may not be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(count, before[0]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def seconds(url: str, count: int) -> list[float]:
    """How long answers take, shortest first: one client, one request after the other."""
    taken = []
    with httpx.Client(base_url=url, timeout=60) as http:
        for _ in range(count):
            began = time.perf_counter()
            http.post("/v1/completions", json=ASK).raise_for_status()
            taken.append(time.perf_counter() - began)
    return sorted(taken)


@pytest.mark.long
def test_five_thousand_idle(forge: ReplicaForge, tmp_path: Path) -> None:
    """Beside 5,000 idle connections and 200 whose headers trickle in: what others feel, and that it ends."""
    stop = threading.Event()

    def dawdle(port: int) -> None:
        while not stop.is_set():  # the server cuts them off again and again
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(200)]
                while not stop.wait(1.0):
                    for one in slow:
                        one.sendall(b"G")

    replica = Replica(forge, tmp_path, str(tmp_path / "store"))
    thread = threading.Thread(target=dawdle, args=(replica.port,), daemon=True)
    try:
        replica.start().until_ready()
        process = psutil.Process(replica.pid)
        seconds(replica.url, 200)
        rss, alone = process.memory_info().rss, seconds(replica.url, 1000)
        with files(6000), idle(replica.port, 5000) as held:
            thread.start()
            beside, grown = seconds(replica.url, 1000), process.memory_info().rss - rss
            held[0].sendall(PROBE)
            assert held[0].recv(4096).startswith(b"HTTP/1.1 200")
            stop.set()
            thread.join()
        until(lambda: len(process.net_connections("tcp")) < 10, "they are gone")
    finally:
        stop.set()
        replica.close()
    p99 = [round(1e3 * one[990], 2) for one in (alone, beside)]
    print(json.dumps({
        "p50_ms": [round(1e3 * one[500], 2) for one in (alone, beside)], "p99_ms": p99,
        "kb_per_connection": round(grown / 5000 / 1e3, 1),
    }))  # fmt: skip
    assert p99[1] <= 1.2 * p99[0]


class Wire:
    """What is under a connection."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send."""
        self.sent.append(data)

    def close(self) -> None:
        """End."""
        self.sent.append(b"the end")


@pytest.mark.anyio
async def test_a_small_answer_leaves_in_one_piece() -> None:
    """A head waits for the beginning of its body, no longer than a turn of the loop, and never past the end."""
    wire = Wire()
    piece = OnePiece(wire)  # type: ignore[arg-type]
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    for data in (head, b"body", b"more", head):
        piece.write(data)
    assert wire.sent == [head + b"body", b"more"]
    await asyncio.sleep(0)
    assert wire.sent[2:] == [head]
    piece.write(head)
    piece.close()
    await asyncio.sleep(0)
    assert wire.sent[3:] == [head, b"the end"]

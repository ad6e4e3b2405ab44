"""The shipped nginx.conf in a real nginx, in front of servers that say what has reached them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.patience import PATIENCE_SECONDS, until
from tests.ports import NO_CERTIFICATES, free_port
from tests.redis_server import program

CONFIG = Path(__file__).parents[2] / "docker" / "nginx.conf"
NAMES = [f"prompt-{number}" for number in range(21)]  # odd: turn by turn would give the second round to the others
LARGE_BYTES = 65 << 20
"""More than nginx takes by itself, and more than it would keep in memory."""


class Upstream(ThreadingHTTPServer):
    """A server that answers with its number and the bytes it got; /stream ends when it is told to go on."""

    def __init__(self, number: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.number = number
        self.go_on = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """One connection of nginx's."""

    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_POST(self) -> None:
        """Answer."""
        rest = int(self.headers["Content-Length"])
        num_bytes = rest
        while rest:
            rest -= len(self.rfile.read(min(rest, 1 << 16)))
        if self.path == "/stream":
            self._stream()
            return
        body = json.dumps({"server": self.server.number, "bytes": num_bytes}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b"data: first\n\n")
        if self.server.go_on.wait(PATIENCE_SECONDS):
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def configured(folder: Path, ports: list[int], bind: int) -> Path:
    """Write the shipped configuration with these servers for the containers' names, and nothing outside a folder."""
    text = CONFIG.read_text()
    for number, port in enumerate(ports, 1):
        text = text.replace(f"promptd-{number}:8000", f"127.0.0.1:{port}")
    text, num_binds = re.subn("listen 8080;", f"listen 127.0.0.1:{bind};", text)
    assert num_binds == 1 and ":8000" not in text
    places = "".join(f"{one}_temp_path {folder};" for one in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    text = text.replace("http {", f"http {{ access_log off; {places}")
    user = "user root;" if os.geteuid() == 0 else ""  # else another user, who may not see this folder
    path = folder / "nginx.conf"
    path.write_text(f"daemon off; pid {folder}/nginx.pid; error_log stderr; {user}\n{text}")
    return path


def words(config: Path, *more: str) -> list[str]:
    """The command."""
    return [program("nginx"), "-c", str(config), "-p", str(config.parent), "-e", "stderr", *more]


@pytest.fixture
def upstreams() -> Iterator[list[Upstream]]:
    """Two servers."""
    with Upstream(0) as one, Upstream(1) as two:
        for server in (one, two):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        yield [one, two]
        for server in (one, two):
            server.go_on.set()
            server.shutdown()


@contextlib.contextmanager
def nginx(folder: Path, upstreams: list[Upstream]) -> Iterator[httpx.Client]:
    """Run it for a block; yields a client of it."""
    bind = free_port()
    config = configured(folder, [server.server_address[1] for server in upstreams], bind)
    process = subprocess.Popen(words(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def is_there() -> bool:
        assert process.poll() is None, "it ends by itself"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", bind), 1):
            return True
        return False

    try:
        until(is_there, "nginx listens")
        url = f"http://127.0.0.1:{bind}"
        with httpx.Client(base_url=url, timeout=PATIENCE_SECONDS, verify=NO_CERTIFICATES) as http:
            yield http
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    """nginx -t says nothing against it; the control has a word that nginx does not know."""
    config = configured(tmp_path, [1, 2], 3)
    for text, is_good in ((config.read_text(), True), (config.read_text().replace("keepalive", "keepalife"), False)):
        config.write_text(text)
        done = subprocess.run(words(config, "-t"), capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode == 0 and "[warn]" not in done.stderr) == is_good, done.stderr


def test_what_passes(upstreams: list[Upstream], tmp_path: Path) -> None:
    """Streams as they come; bodies of any size; no metrics; and the same prompt goes to the same server."""
    with nginx(tmp_path, upstreams) as http:
        with http.stream("POST", "/stream", content=b"{}") as answer:
            lines = (line for line in answer.iter_lines() if line)
            assert next(lines) == "data: first"
            for server in upstreams:
                server.go_on.set()
            assert list(lines) == ["data: [DONE]"]
        large = http.post("/v1/prompts/large", content=bytes(LARGE_BYTES))
        assert large.status_code == 200 and large.json()["bytes"] == LARGE_BYTES, large.text
        assert [http.get(path).status_code for path in ("/metrics", "/%6detrics")] == [404, 404]
        asked = [http.post("/", headers={"X-Prompt-Id": name}).json()["server"] for name in NAMES * 2]
        assert asked[: len(NAMES)] == asked[len(NAMES) :] and set(asked) == {0, 1}


def test_a_server_that_is_gone(upstreams: list[Upstream], tmp_path: Path) -> None:
    """What no server has seen goes to the other one, whatever its prompt."""
    upstreams[0].shutdown()
    upstreams[0].server_close()
    with nginx(tmp_path, upstreams) as http:
        answers = [http.post("/", headers={"X-Prompt-Id": name}) for name in NAMES]
        assert [answer.status_code for answer in answers] == [200] * len(NAMES)
        assert {answer.json()["server"] for answer in answers} == {1}

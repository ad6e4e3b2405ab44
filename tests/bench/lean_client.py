"""A client that costs as little as can be, in a process of its own: it shares the machine with the server it asks.

It notes when something came, and looks into it when all is over. `python -m tests.bench.lean_client` reads lines
`{"port", "concurrency", "bodies"}` and answers each with `{"answers": [{"started", "parts": [[time, tokens], …]}],
"cpu_seconds"}`.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from promptd.bench.report import Sample

_END = b"0\r\n\r\n"
_ONE_TOKEN = b'"token_ids":['
_LIMIT_SECONDS = 300.0


@dataclass(slots=True)
class _Connection:
    """One request at a time."""

    socket: socket.socket
    started: float = 0.0
    parts: list[tuple[float, bytes]] = field(default_factory=list)


class LeanClient:
    """The other process, as this one sees it."""

    def __init__(self, asked: IO[str], told: IO[str]) -> None:
        self._asked = asked
        self._told = told

    def ask(self, port: int, bodies: Sequence[dict[str, Any]], concurrency: int) -> tuple[list[Sample], float]:
        """Have all answered, so many at once; return the samples and the CPU seconds of asking."""
        self._asked.write(json.dumps({"port": port, "concurrency": concurrency, "bodies": bodies}) + "\n")
        self._asked.flush()
        told = json.loads(self._told.readline())
        return [
            Sample(one["started"], [at for at, num in one["parts"] for _ in range(num)]) for one in told["answers"]
        ], told["cpu_seconds"]


@contextmanager
def lean_client() -> Iterator[LeanClient]:
    """Start the other process for a block."""
    command = [sys.executable, "-m", "tests.bench.lean_client"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the client has no pipes")
        yield LeanClient(process.stdin, process.stdout)
        process.stdin.close()


def _ask(port: int, bodies: Sequence[bytes], concurrency: int) -> list[_Connection]:
    """Return one connection's state for every request, in the order in which they ended."""
    todo, ended = iter(bodies), []
    with select.epoll() as ready:
        open_ones: dict[int, _Connection] = {}

        def begin(connection: socket.socket) -> None:
            body = next(todo, None)
            if body is None:  # closing takes it from those that are polled
                open_ones.pop(connection.fileno(), None)
                connection.close()
                return
            open_ones[connection.fileno()] = _Connection(connection, time.perf_counter())
            connection.sendall(body)

        for _ in range(min(concurrency, len(bodies))):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ready.register(connection, select.EPOLLIN)
            begin(connection)
        while open_ones:
            if not (found := ready.poll(_LIMIT_SECONDS)):
                raise TimeoutError("the server sends nothing more")
            for number, _ in found:
                one = open_ones[number]
                came = one.socket.recv(1 << 16)
                if not came:
                    raise ConnectionError("the server hung up")
                one.parts.append((time.perf_counter(), came))
                if came.endswith(_END) or (len(came) < len(_END) and b"".join(p for _, p in one.parts).endswith(_END)):
                    ended.append(one)
                    begin(one.socket)
    return ended


def _request(port: int, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _described(one: _Connection) -> dict[str, Any]:
    """Count the tokens of every part: those whose event has begun in it."""
    if not one.parts[0][1].startswith(b"HTTP/1.1 200 "):
        raise ConnectionError(f"the server answered {one.parts[0][1][:300]!r}")
    read, known, parts = b"", 0, []
    for at, part in one.parts:
        read += part
        count = read.count(_ONE_TOKEN)
        if count > known:
            parts.append((at, count - known))
        known = count
    return {"started": one.started, "parts": parts}


def main() -> None:
    """Answer line by line, until there are no more."""
    for line in sys.stdin:
        asked = json.loads(line)
        bodies = [_request(asked["port"], body) for body in asked["bodies"]]
        began = time.process_time()
        ended = _ask(asked["port"], bodies, asked["concurrency"])
        seconds = time.process_time() - began
        print(json.dumps({"answers": [_described(one) for one in ended], "cpu_seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()

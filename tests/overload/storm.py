"""A client that costs as little as can be, in a process of its own: it shares the machine with the server it floods.

Requests come at random moments, so many a second whatever becomes of them (`rate`: an open loop), or so many at a time
(`at_once`: a closed one). Connections are kept and used again, as SDKs and balancers do, or made anew for each request.
Answers are looked into when all is over. `python -m tests.overload.storm` reads one order a line and answers each.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from tests.overload.wire import request_bytes

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_LIMIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came, and when: seconds on the monotonic clock."""

    status: int
    code: str | None
    retry_after: int | None
    sent: float
    ended: float

    @property
    def seconds(self) -> float:
        """From the request's first byte to the answer's last."""
        return self.ended - self.sent


@dataclass(frozen=True, slots=True)
class Storm:
    """All that came of one order."""

    began: float
    answers: list[Answer]
    cpu_seconds: float
    """Of the client, from the first request to the last answer."""
    latest_seconds: float
    """How long after its moment a request was sent, at most: the client did not keep up with its own order."""

    def count(self, status: int) -> int:
        """How many had one status."""
        return sum(answer.status == status for answer in self.answers)

    def seconds(self, status: int) -> list[float]:
        """How long each with a status took, shortest first."""
        return sorted(answer.seconds for answer in self.answers if answer.status == status)

    def rate(self, status: int, seconds: float, skip: int) -> float:
        """How many a second with a status ended in the seconds from the beginning, behind the first `skip` of them.

        Rows that begin together end together: from the end of one wave to that of another.
        """
        ended = sorted(answer.ended - self.began for answer in self.answers if answer.status == status)
        ended = [one for one in ended if one < seconds]
        return (len(ended) - skip) / (ended[-1] - ended[skip - 1])


class StormClient:
    """The other process, as this one sees it."""

    def __init__(self, asked: IO[str], told: IO[str]) -> None:
        self._asked = asked
        self._told = told

    def ask(self, port: int, body: dict[str, Any], seconds: float, **order: Any) -> Storm:
        """Ask for so many seconds, `rate` or `at_once`; wait for all answers. `keeps` connections unless told not,
        `key` says who asks."""
        line = json.dumps({"port": port, "body": body, "seconds": seconds, "keeps": True, **order})
        self._asked.write(line + "\n")
        self._asked.flush()
        told = json.loads(self._told.readline())
        return Storm(**{**told, "answers": [Answer(*one) for one in told["answers"]]})


@contextlib.contextmanager
def storm_client() -> Iterator[StormClient]:
    """Start the other process for a block."""
    command = [sys.executable, "-m", "tests.overload.storm"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield StormClient(process.stdin, process.stdout)
        finally:
            process.stdin.close()


@dataclass(slots=True)
class _Asked:
    """One request on its way."""

    connection: socket.socket
    sent: float
    ended: float = 0.0
    came: bytes = b""

    @property
    def is_whole(self) -> bool:
        """Whether the answer is all here."""
        head, found, content = self.came.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        return bool(found) and length is not None and len(content) >= int(length[1])

    def facts(self) -> tuple[int, str | None, int | None, float, float]:
        """The fields of an `Answer`."""
        head, _, content = self.came.partition(b"\r\n\r\n")
        retry = re.search(rb"retry-after: (\d+)", head, re.IGNORECASE)
        status = int(head.split()[1])
        code = None if status == 200 else json.loads(content)["error"]["code"]
        return status, code, None if retry is None else int(retry[1]), self.sent, self.ended


class _Client:
    """Sends one request again and again, and takes what comes."""

    def __init__(self, port: int, request: bytes, *, keeps: bool) -> None:
        self._port = port
        self._request = request
        self._keeps = keeps
        self._idle: list[socket.socket] = []
        self._ready = selectors.DefaultSelector()
        self.num_open = 0
        self.ended: list[_Asked] = []

    def begin(self) -> None:
        """Send one."""
        sent = time.monotonic()
        if self._idle:
            connection = self._idle.pop()
        else:
            connection = socket.create_connection(("127.0.0.1", self._port), timeout=_LIMIT_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(self._request)
        self._ready.register(connection, selectors.EVENT_READ, _Asked(connection, sent))
        self.num_open += 1

    def take(self, seconds: float) -> int:
        """Wait so long for something to come; return how many answers are whole now that were not."""
        num_ended = 0
        for key, _ in self._ready.select(seconds):
            one: _Asked = key.data
            came = one.connection.recv(1 << 16)
            if not came:
                raise ConnectionError("the server hung up")
            one.came += came
            if one.is_whole:
                one.ended = time.monotonic()
                self._ready.unregister(one.connection)
                self.ended.append(one)
                num_ended += 1
                if self._keeps:
                    self._idle.append(one.connection)
                else:
                    one.connection.close()
        self.num_open -= num_ended
        return num_ended

    def close(self) -> None:
        """End all connections."""
        for connection in self._idle:
            connection.close()
        self._ready.close()


def _run(client: _Client, end: float, rate: float | None, at_once: int) -> float:
    """Ask until `end`, and wait for what is open then; return how late the latest request was."""
    dice, latest, at, last = random.Random(11), 0.0, time.monotonic(), time.monotonic()
    for _ in range(at_once):
        client.begin()
    while True:
        now = time.monotonic()
        while rate is not None and at < end and at <= now:
            client.begin()
            latest = max(latest, now - at)
            at += dice.expovariate(rate)
            now = time.monotonic()
        is_over = now >= end if rate is None else at >= end
        if is_over and not client.num_open:
            return latest
        num_ended = client.take(_LIMIT_SECONDS if rate is None or is_over else max(0.0, at - now))
        if num_ended:
            last = time.monotonic()
            for _ in range(0 if rate is not None or last >= end else num_ended):
                client.begin()
        elif time.monotonic() - last > _LIMIT_SECONDS:
            raise TimeoutError("the server answers nothing more")


def main() -> None:
    """Carry out orders until there are no more."""
    for line in sys.stdin:
        order = json.loads(line)
        request = request_bytes(order["body"], key=order.get("key"), keeps=order["keeps"])
        client = _Client(order["port"], request, keeps=order["keeps"])
        used, began = time.process_time(), time.monotonic()
        latest = _run(client, began + order["seconds"], order.get("rate"), order.get("at_once", 0))
        used = time.process_time() - used
        client.close()
        answers = [one.facts() for one in client.ended]
        told = {"began": began, "answers": answers, "cpu_seconds": used, "latest_seconds": latest}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

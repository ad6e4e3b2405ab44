"""A client on bare sockets: one connection a request, every answer with all its headers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    """One whole answer, and when it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    sent: float
    first: float
    """When the first bytes behind the headers came."""
    ended: float

    @property
    def seconds(self) -> float:
        """From the request's first byte to the answer's last."""
        return self.ended - self.sent

    @property
    def code(self) -> str | None:
        """The error's code."""
        return None if self.status == 200 else str(json.loads(self.body)["error"]["code"])


def request_bytes(body: Any, *, path: str = "/v1/completions", key: str | None = None, keeps: bool = False) -> bytes:
    """One POST as it goes over the wire; `keeps` leaves the connection open."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [] if keeps else ["Connection: close"]
    lines += [f"Content-Length: {len(content)}"] + ([f"Authorization: Bearer {key}"] if key is not None else [])
    return "\r\n".join([*lines, "", ""]).encode() + content


async def ask(port: int, body: Any, *, key: str | None = None, seconds: float = 60) -> Reply:
    """Send one request and read the answer to its end."""
    sent = time.monotonic()
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request_bytes(body, key=key))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            piece = await reader.read(1 << 16)
            first = time.monotonic()
            content = piece
            while piece:
                piece = await reader.read(1 << 16)
                content += piece
        finally:
            writer.close()
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    return Reply(int(head[0].split()[1]), headers, content, sent, first, time.monotonic())

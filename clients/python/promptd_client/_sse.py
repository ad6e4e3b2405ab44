"""Server-sent events: bytes in, events out. Chunks may break anywhere, inside a character too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from promptd_client.errors import InvalidReplyError

MAX_EVENT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its data lines joined, and its type (`message` where none was sent)."""

    data: str
    type: str = "message"


class EventParser:
    """Feed it what arrives; it yields every event that is complete. An unfinished one at the end is dropped."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._data: list[str] = []
        self._type = ""
        self._num_bytes = 0
        self._skips_newline = False

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yield the events that this chunk completes."""
        for line in self._lines(chunk):
            self._num_bytes += len(line)
            event = self._take(line)
            if event is not None:
                yield event
        if len(self._pending) + self._num_bytes > MAX_EVENT_BYTES:
            raise InvalidReplyError(f"an event of the stream has more than {MAX_EVENT_BYTES} bytes")

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        """Yield lines ended by CR, LF or CRLF, also where a CRLF is cut in two."""
        if self._skips_newline and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skips_newline = False
        self._pending += chunk
        lines = bytes(self._pending).splitlines(keepends=True) if chunk else []
        complete = [line for line in lines if line.endswith((b"\r", b"\n"))]
        self._pending = bytearray(b"".join(lines[len(complete) :]))
        self._skips_newline = bool(complete) and not self._pending and complete[-1].endswith(b"\r")
        for line in complete:
            yield line.rstrip(b"\r\n")

    def _take(self, line: bytes) -> Event | None:
        if not line:
            event = Event("\n".join(self._data), self._type or "message") if self._data else None
            self._data, self._type, self._num_bytes = [], "", 0
            return event
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._data.append(text)
        elif name == b"event":
            self._type = text
        return None  # comments, ids and retry times carry nothing that is needed here

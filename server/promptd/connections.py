"""HTTP connections that can be cut: one whose client neither reads nor says what it wants ends in no other way.

And no more of them than there are files for: without one a server could neither accept nor read its store.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from promptd.api.heads import read_head
from promptd.api.shedding import Shedding
from promptd.api.stalls import ABORT

HEADER_SECONDS = 10.0
"""A request's headers have come by then, from the connection's beginning or from their own first byte."""
MAX_FILES = 1 << 16
"""Files that a server asks for, where it may have so many."""
OWN_FILES = 256
"""Of these, for the model, the store and logs."""
_MOST_CLOSING_WAITS = 5
"""Looks, each half of `HEADER_SECONDS` behind the other, at a connection that ends and still has something to send."""


class AbortableHttp(H11Protocol):
    """uvicorn's protocol, which takes 64 KiB of headers at most: every request's state knows how to cut its connection.

    Late headers cut it too. What there is no room for is answered here, and uvicorn does not hear of it.
    """

    app_state: dict[str, Any]
    conn: Any
    cycle: Any
    connections: set[Any]
    flow: Any
    server_state: Any
    transport: Any
    timeout_keep_alive_task: asyncio.TimerHandle | None

    shedding: Shedding
    max_connections: int
    """Requests on further ones are refused; those beyond an eighth more are cut."""
    _num_ignored = 0
    """Bytes still to come of the body of a request that was refused."""
    _ends = False
    """Whether the connection ends with the request that was refused."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        super().connection_made(transport)  # type: ignore[arg-type] # it says less than asyncio promises
        num_over = len(self.connections) - self.max_connections
        self.transport = OnePiece(transport)
        self._cut = partial(_cut, transport)
        self._num_waits = 0
        self.app_state = {**self.app_state, ABORT: self._cut}
        self._is_crowded = num_over > 0
        self._wire: Any = transport
        self._look_later()
        if num_over > self.max_connections // 8:
            self._cut()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in what has come."""
        if self._num_ignored:
            num_dropped = min(self._num_ignored, len(data))
            self._num_ignored -= num_dropped
            data = data[num_dropped:]
            self._refused()
        if not data or self._ends:
            return
        if self._is_crowded:
            self._take_of_crowd(data)
        elif not (self.shedding.is_full and self._is_idle and self._refuse(data)):
            super().data_received(data)

    @property
    def _is_idle(self) -> bool:
        """Whether the connection is between two requests, and its client reads answers."""
        is_between = self.conn.our_state is h11.IDLE and self.conn.their_state is h11.IDLE
        return is_between and not self.conn.trailing_data[0] and not self.flow.write_paused

    def _refuse(self, data: bytes) -> bool:
        """Answer a request for which there is no room, unless there is more here than one, or less."""
        head = read_head(data)
        if head is None or head.num_missing(data) < 0:
            return False
        answer = self.shedding.answer(head, self.server_state.default_headers)
        if answer is not None:
            self._send_refusal(answer, head.num_missing(data), ends=head.closes)
        return answer is not None

    def _take_of_crowd(self, data: bytes) -> None:
        """Let a probe pass that is all that has come, and end the connection with anything else."""
        if not self._is_idle:  # the probe is being answered
            self.cycle.keep_alive = False
            return
        head = read_head(data)
        num_missing = 0 if head is None else head.num_missing(data)
        answer = self.shedding.answer_crowd(head if num_missing >= 0 else None, self.server_state.default_headers)
        if answer is None:
            super().data_received(data)
        else:
            self._send_refusal(answer, max(0, num_missing), ends=True)

    def _send_refusal(self, answer: bytes, num_missing: int, *, ends: bool) -> None:
        self._unset_keepalive_if_required()
        self._num_waits = 0
        self._num_ignored = num_missing
        self._ends = ends
        self._wire.write(answer)
        self._refused()

    def _refused(self) -> None:
        """Go on behind a request that was refused, once its body is here."""
        if self._num_ignored:
            return
        if self._ends:
            self.transport.close()
        else:
            self.on_response_complete()

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(HEADER_SECONDS / 2, self._look)

    def _look(self) -> None:
        """Cut a connection that has neither a request nor is idle between two, a second time: it dawdles.

        One that ends has half a minute for what is still to be sent.
        """
        is_closing = self.transport.is_closing()  # and nobody reads what it still has to send
        is_answering = self.cycle is not None and not self.cycle.response_complete
        is_waiting = is_closing or (not is_answering and self.timeout_keep_alive_task is None)
        if is_waiting and self._num_waits >= (_MOST_CLOSING_WAITS if is_closing else 1):
            self._cut()
            return
        self._num_waits = self._num_waits + 1 if is_waiting else 0
        self._look_later()


class OnePiece:
    """A transport whose answers' heads leave with the beginning of their bodies: one call of the system, one packet.

    A head that is followed by nothing yet leaves in the loop's next turn.
    """

    def __init__(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send, or keep what is a head for a moment."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        """Send what was kept, and end."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            self.write(b"")


def http_protocol(shedding: Shedding, max_connections: int) -> type[AbortableHttp]:
    """Return the protocol of one server."""
    return type("Http", (AbortableHttp,), {"shedding": shedding, "max_connections": max_connections})


def most_connections() -> int:
    """Take as many files as this process may have, and return for how many connections, one more beside each."""
    wanted, (soft, hard) = MAX_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    num_files = MAX_FILES if soft == resource.RLIM_INFINITY else min(soft, MAX_FILES)
    return max(16, (num_files - OWN_FILES) // 2)


def _cut(transport: Any) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None:  # at once, also in the kernel: what waits there is thrown away
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()

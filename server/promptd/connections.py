"""HTTP connections that the application may cut: one whose client reads nothing cannot be closed in peace."""

from __future__ import annotations

import asyncio
import socket
import struct
from functools import partial
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from promptd.api.stalls import ABORT


class AbortableHttp(AutoHTTPProtocol):  # type: ignore[misc, valid-type] # one of several classes, chosen at import
    """uvicorn's protocol; every request's state knows how to cut its connection."""

    app_state: dict[str, Any]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, ABORT: partial(_cut, transport)}


def _cut(transport: asyncio.BaseTransport) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None:  # at once, also in the kernel: what waits there is thrown away
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()

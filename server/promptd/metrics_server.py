"""`/metrics` and `/livez` of a process that answers no requests: a training worker. On a thread of its own."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

MAX_SILENT_SECONDS = 300.0
"""A pass of a large model on a CPU may take a minute; five mean that it hangs."""
_CLIENT_SECONDS = 10.0
_POLL_SECONDS = 0.1
"""How soon it notices that it is to end."""


class MetricsServer:
    """Answers while it is open, over a socket that is bound already.

    `silent_seconds` tells how long the process has had work and done nothing; it is called from this thread.
    """

    def __init__(self, bound: socket.socket, registry: CollectorRegistry, silent_seconds: Callable[[], float]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _CLIENT_SECONDS

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                elif path == "/livez":
                    silent = silent_seconds()
                    is_live = silent <= MAX_SILENT_SECONDS
                    told = {"status": "ok"} if is_live else {"status": "stalled", "seconds_since_progress": silent}
                    self._answer(200 if is_live else 503, "application/json", json.dumps(told).encode())
                else:
                    self._answer(404, "text/plain; charset=utf-8", b"there are /metrics and /livez\n")

            def _answer(self, status: int, media_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", media_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def version_string(self) -> str:
                return "promptd"

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: probes come every few seconds."""

        self._server = ThreadingHTTPServer(bound.getsockname()[:2], Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = bound
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_SECONDS,), daemon=True)

    def __enter__(self) -> Self:
        """Listen and answer from now on."""
        self._server.server_activate()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Answer no longer."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

"""Structured logs on standard error: JSON, or for people where it is a terminal. Never content, never keys."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promptd.api.services import new_id

_MAX_REQUEST_ID_CHARS = 128
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/health", "/metrics"})


def configure(*, level: int = logging.INFO) -> None:
    """Route structlog and the standard library's loggers through one renderer."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    logging.getLogger("httpx").setLevel(logging.WARNING)


class RequestLog:
    """ASGI middleware: gives every request an id, echoes it in `X-Request-Id`, logs and counts it at its end."""

    def __init__(self, app: ASGIApp, observe: Callable[[str, str, int, float], None]) -> None:
        """`observe` takes method, route, status and seconds; the two first are of a bounded number."""
        self._app = app
        self._observe = observe
        self._log = structlog.get_logger("promptd.request")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on under a request id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _client_id(scope) or new_id("req")
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "unknown")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._observe(method, route, status, time.monotonic() - began)
                if scope["path"] not in _QUIET_PATHS:
                    self._log.info(
                        "request",
                        method=scope["method"],
                        path=scope["path"][:256],
                        status=status,
                        seconds=round(time.monotonic() - began, 4),
                    )


def _client_id(scope: Scope) -> str | None:
    """The client's own id, where it is short and plain; a label only, never a key."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            if len(text) <= _MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable() and text.strip():
                return text
    return None

"""Structured logs on standard error: JSON, or for people where it is a terminal. Never content, never keys.

What libraries put into messages of errors may be anything: of an error that is none of ours only its type and where it
was raised is written. Keys are masked wherever they stand.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promptd.api.services import request_id
from promptd.api.trail import Trail, shown_path, trail_in
from promptd.tracing import QUIET_PATHS, Tracing

_COUNT_SECONDS = 1.0


_KEYS = r"pd_[A-Za-z0-9]{4,}_[A-Za-z0-9]+|(?i:bearer)\s+\S+|(?<=://)[^/@\s]*:[^/@\s]+(?=@)"
_MASK = "[masked]"


class KeyMask:
    """Processor: issued keys, `Bearer …`, passwords in addresses and given secrets are never written."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._pattern = re.compile("|".join([_KEYS, *map(re.escape, filter(None, secrets))]))

    def __call__(self, _: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Mask them in every value."""
        return {name: self._masked(value) for name, value in event.items()}

    def _masked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._pattern.sub(_MASK, value)
        return [self._masked(one) for one in value] if isinstance(value, (list, tuple)) else value


def tell_where(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Processor: in the place of an exception, what kind it is and the lines that it came through, innermost last."""
    found = event.pop("exc_info", None)
    if not found:
        return event
    error = sys.exc_info()[1] if found is True else found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        frames = traceback.extract_tb(error.__traceback__)
        event["exception"] = type(error).__name__
        event["raised_at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    return event


def configure(*, level: int = logging.INFO, secrets: Iterable[str] = ()) -> None:
    """Route structlog and the standard library's loggers through one renderer; `secrets` are never written."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        tell_where,
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
                KeyMask(secrets),
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

    def __init__(
        self, app: ASGIApp, observe: Callable[[str, str, int, float, str], None], tracing: Tracing | None = None
    ) -> None:
        """`observe` takes method, route, status, seconds and an error's code; routes are of a bounded number."""
        self._app = app
        self._observe = observe
        self._tracing = tracing
        self._log = structlog.get_logger("promptd.request")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on under a request id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own_id = request_id(Headers(scope=scope).get("x-request-id"))
        began, status = time.monotonic(), 0
        headers = [(b"x-request-id", own_id.encode())]
        if self._tracing is not None and (traceresponse := self._tracing.traceresponse()):
            headers.append((b"traceresponse", traceresponse.encode()))
        trace_ids = {} if self._tracing is None else self._tracing.ids()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=own_id, **trace_ids):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "unknown")
                trail = trail_in(scope)
                self._observe(scope["method"], route, status, time.monotonic() - began, trail.error_code)
                if scope["path"] not in QUIET_PATHS:
                    self._log.info(
                        "request",
                        method=scope["method"],
                        path=shown_path(scope["path"])[:256],
                        status=status,
                        seconds=round(time.monotonic() - began, 4),
                        **_facts(trail),
                    )


class RefusedCount:
    """What a full server refused is written once a second: a flood of requests makes no flood of lines."""

    def __init__(self) -> None:
        self._log = structlog.get_logger("promptd.request")
        self._counts = Counter[tuple[str, str, int, str]]()

    def add(self, tenant: str, route: str, status: int, code: str) -> None:
        """Take in one."""
        if not self._counts:
            loop, nobody = asyncio.get_running_loop(), contextvars.Context()  # the line is no single request's
            loop.call_later(_COUNT_SECONDS, self._write, context=nobody)
        self._counts[tenant, route, status, code] += 1

    def _write(self) -> None:
        counts, self._counts = self._counts, Counter()
        for (tenant, route, status, code), count in counts.items():
            self._log.info("refused", tenant=tenant, path=route, status=status, code=code, count=count)


def _facts(trail: Trail) -> dict[str, Any]:
    """What a log says of a request beyond HTTP: whose it was, exact prompts, where the time went, what was wrong."""
    facts = {
        "tenant": trail.tenant,
        "prompts": trail.versions,
        "milliseconds": trail.milliseconds(),
        "code": trail.error_code,
    }
    return {name: value for name, value in facts.items() if value}

"""Every failure leaves as `{"error": {"message", "type", "param", "code"}}`, whatever raised it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from promptd_store import StoreError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promptd.api.trail import shown_path, trail_in
from promptd.errors import (
    InvalidRequestError,
    MethodNotAllowedError,
    PayloadTooLargeError,
    PromptdError,
    QuotaError,
    RouteNotFoundError,
)

_MAX_SHOWN = 120
_MAX_MESSAGE = 1000
_TOO_LARGE = "the body is larger than this route takes"
_log = structlog.get_logger(__name__)


def envelope(error: PromptdError | StoreError) -> dict[str, dict[str, str | None]]:
    """OpenAI's error body; what it quotes of the request may be a megabyte, what it says is not."""
    kind = getattr(error, "type", "server_error" if error.status >= 500 else "invalid_request_error")
    message, param = _cut(str(error), _MAX_MESSAGE), _cut(error.param, _MAX_SHOWN)
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}


def _cut(text: str | None, max_chars: int) -> str | None:
    return text if text is None or len(text) <= max_chars else text[:max_chars] + "…"


def error_response(
    error: PromptdError | StoreError, scope: Scope, extra_headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as the answer to a request, with Retry-After where it is worth trying again."""
    trail_in(scope).error_code = error.code
    headers = {**getattr(error, "headers", {}), **(extra_headers or {})}
    retry_after = getattr(error, "retry_after_seconds", None)
    if retry_after is None and error.status == 503:
        retry_after = random.randint(1, 3)  # not everybody at the same moment
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if isinstance(error, QuotaError):
        headers["x-should-retry"] = "false"  # OpenAI's clients repeat every other 429
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(envelope(error), status_code=error.status, headers=headers)


def describe(error: RequestValidationError) -> InvalidRequestError:
    """Turn pydantic's most telling complaint into one sentence that names the field and shows the value.

    A union complains once for every alternative: about the value of the one whose type was meant, about the type of all
    others.
    """
    problem = max(error.errors(), key=lambda one: (not _is_of_type(one), len(one["loc"])))
    where = list(_fields(problem, error.body))
    if isinstance(problem.get("input"), bytes):
        return InvalidRequestError("the body must be JSON, with Content-Type: application/json", code="invalid_body")
    param = where[0] if where else None
    place = _cut(".".join(where), _MAX_SHOWN) or "body"
    shown = _cut(repr(problem.get("input")), _MAX_SHOWN)
    code = "unknown_field" if problem["type"] == "extra_forbidden" else None
    return InvalidRequestError(
        f"{place}: {problem['msg'].removeprefix('Value error, ')}, got {shown}", param=param, code=code
    )


def _is_of_type(problem: Mapping[str, Any]) -> bool:
    return str(problem["type"]).endswith(("_type", "_parsing"))


def _fields(problem: Mapping[str, Any], body: Any) -> Iterator[str]:
    """Yield the names on the way to what is wrong; what pydantic calls a union's alternatives is not in the body."""
    source, *parts = problem["loc"]
    for number, part in enumerate(parts):
        if isinstance(body, Mapping) and part in body:
            body = body[part]
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part] if part < len(body) else None
        elif source == "body" and not (problem["type"] == "missing" and number == len(parts) - 1):
            continue
        yield str(part)


def install(app: FastAPI) -> None:
    """Register the handlers."""

    @app.exception_handler(PromptdError)
    async def known(request: Request, error: PromptdError) -> JSONResponse:
        return error_response(error, request.scope)

    @app.exception_handler(StoreError)
    async def from_store(request: Request, error: StoreError) -> JSONResponse:
        return error_response(error, request.scope)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(describe(error), request.scope)

    @app.exception_handler(HTTPException)
    async def from_framework(request: Request, error: HTTPException) -> JSONResponse:
        headers = error.headers if error.status_code == MethodNotAllowedError.status else None
        return error_response(_from_framework(request, error), request.scope, headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        refusal = ClientDisconnectedError("the client went away before its body was here")
        return error_response(refusal, request.scope)


def _from_framework(request: Request, error: HTTPException) -> PromptdError:
    if error.status_code == 404:
        return RouteNotFoundError(f"no route {request.method} {request.url.path}")
    if error.status_code == MethodNotAllowedError.status:
        return MethodNotAllowedError(f"{request.url.path} does not take {request.method}")
    if isinstance(error.__cause__, PromptdError):  # raised while the framework read the body
        return error.__cause__
    if error.status_code == 413:
        return PayloadTooLargeError(_TOO_LARGE)
    return InvalidRequestError(f"the body cannot be read: {error.detail}", code="invalid_body")


class ClientDisconnectedError(PromptdError):
    """Nobody reads the answer any more."""

    status = 499
    default_code = "client_disconnected"


class UnexpectedErrors:
    """ASGI middleware: what nobody foresaw is answered here, inside of what counts, logs and names every request.

    The framework's own place for it lies outside of all middleware.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; an answer that has begun can only be cut off."""
        has_begun = False

        async def send_watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        except Exception as error:
            if scope["type"] != "http" or has_begun:
                raise
            _log.exception("unexpected_error", path=shown_path(scope["path"]), error=type(error).__name__)
            answer = error_response(PromptdError("an internal error; the log has the request id"), scope)
            await answer(scope, receive, send)


class OversizeEnvelope:
    """ASGI middleware: the framework answers an oversized Content-Length in plain text, before any handler."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, putting the envelope in the place of a plain 413."""
        replaced = False

        async def send_envelope(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == PayloadTooLargeError.status:
                is_plain = any(key == b"content-type" and value[:5] == b"text/" for key, value in message["headers"])
                if is_plain:
                    replaced = True
                    await error_response(PayloadTooLargeError(_TOO_LARGE), scope)(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, send_envelope if scope["type"] == "http" else send)

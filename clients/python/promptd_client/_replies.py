"""The reading of replies, written once for both clients: JSON to models, errors to exceptions."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from promptd_client._sse import Event
from promptd_client.errors import APIError, InvalidReplyError, error_from_body
from promptd_client.models import Prompt

T = TypeVar("T")


def reader(kind: type[T], key: str | None = None) -> Callable[[httpx.Response], T]:
    """Return a function that reads a JSON reply, or one field of it, as `kind`."""
    adapter = TypeAdapter(kind)

    def parse(response: httpx.Response) -> T:
        plain = _json(response.text)
        if key is not None:
            if not isinstance(plain, dict) or key not in plain:
                raise InvalidReplyError(f"the reply of {response.request.url} lacks {key!r}: {response.text[:200]}")
            plain = plain[key]
        return _validated(adapter, plain)

    return parse


_plain_prompt = reader(Prompt)


def read_prompt(response: httpx.Response) -> Prompt:
    """Read one record with its ETag."""
    etag = response.headers.get("etag")
    return _plain_prompt(response).model_copy(update={"etag": etag.strip('"') if etag else None})


def event_reader(kind: type[T]) -> Callable[[str], T]:
    """Return a function that reads one event's data as `kind`."""
    adapter = TypeAdapter(kind)
    return lambda data: _validated(adapter, _json(data))


def read_event(event: Event, parse: Callable[[str], T]) -> T:
    """Read one event of a stream, or raise the error that it carries."""
    plain = _json(event.data)
    if event.type == "error" or (isinstance(plain, dict) and "error" in plain):
        raise error_from_body(plain, None)
    return parse(event.data)


def error_of(response: httpx.Response) -> APIError:
    """Read an error reply whose body was received."""
    try:
        body = response.json()
    except ValueError:
        text = response.text.strip()
        body = {"error": {"message": f"status {response.status_code}: {text[:200]}"}} if text else None
    return error_from_body(
        body,
        response.status_code,
        request_id=response.headers.get("x-request-id"),
        retry_after_seconds=retry_after(response.headers.get("retry-after")),
    )


def retry_after(value: str | None) -> float | None:
    """Read a Retry-After header, seconds or a date, as seconds from now."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidReplyError(f"the reply is not JSON: {text[:200]}") from error


def _validated(adapter: TypeAdapter[T], plain: Any) -> T:
    try:
        return adapter.validate_python(plain)
    except ValidationError as error:
        raise InvalidReplyError(f"the reply is not what this API promises: {error}") from error

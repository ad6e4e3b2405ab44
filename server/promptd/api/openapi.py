"""What `/openapi.json` says about answers and uploads, beyond what the handlers' signatures tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from promptd.api.schemas import TextPromptBody

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_TEXT: dict[str, Any] = {"schema": {"type": "string"}}
_OBJECT: dict[str, Any] = {"schema": {"type": "object"}}


class ErrorDetail(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every error."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


Responses = Mapping[int | str, dict[str, Any]]

_STATUSES = {
    400: "A field is wrong; the error names it and its value.",
    401: "No API key, or not a good one.",
    403: "The key may not do this.",
    404: "It is not there, or not the caller's.",
    405: "The route exists, the method does not.",
    408: "The body did not come.",
    409: "It contradicts the present state.",
    412: "If-Match or If-None-Match did not hold.",
    413: "The body is too large.",
    422: "The uploaded prompt failed a check; the code says which.",
    429: "A limit of the caller's is reached; Retry-After says when to come again, where waiting helps.",
    500: "The server failed at this.",
    503: "A limit of the server's is reached, or the store is away; with Retry-After.",
    504: "A deadline passed.",
}
_ERROR = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}}
ERRORS: Responses = {
    status: {"description": text, **({"model": ErrorReply} if status == 500 else _ERROR)}
    for status, text in _STATUSES.items()
}
"""One names the model, the others its schema: of every model FastAPI makes a validator of its own for every route."""
JSON: Responses = {200: {"description": "Done.", "content": {"application/json": _OBJECT}}}
STREAM: Responses = {
    200: {
        "description": "The answer, at once or as server-sent events.",
        "content": {"application/json": _OBJECT, "text/event-stream": {}},
    }
}
PUBLISHED: Responses = {**JSON, 201: {"description": "The first version.", "content": {"application/json": _OBJECT}}}
EACH: Responses = {207: {"description": "One result for each.", "content": {"application/json": _OBJECT}}}
FILE: Responses = {
    200: {
        "description": "The file.",
        "content": {"application/octet-stream": _BINARY, "application/zip": _BINARY},
    }
}
PLAIN: Responses = {200: {"description": "Prometheus' text format.", "content": {"text/plain": _TEXT}}}
PROBE: Responses = {**JSON, 503: {"description": "Not now.", "content": {"application/json": _OBJECT}}}

UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": _BINARY,
            "application/json": {"schema": TextPromptBody.model_json_schema()},
        },
    }
}
"""A safetensors file as the whole body, or a plain text."""

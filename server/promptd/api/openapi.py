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

ERRORS: Responses = {
    "4XX": {"model": ErrorReply, "description": "The request is wrong; the error names field and value."},
    "5XX": {"model": ErrorReply, "description": "The server could not do it; 503 carries Retry-After."},
}
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

"""JSON from strangers: no duplicate keys, no NaN, no infinities, no lone surrogates; one error type."""

from __future__ import annotations

import json
import math
from typing import Any

from promptd_store.errors import ArtifactError

_SHOWN_CHARS = 80


def shown(value: object) -> str:
    """Return a short printable form of an untrusted value for an error message."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8 kept as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object; an error's code starts with `what`, which is also its `param`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                raise ArtifactError(f"{what}_duplicate_key", f"{what} has the key {shown(key)} twice", what)
            seen[key] = value
        return seen

    def constant(token: str) -> float:
        raise ArtifactError(f"{what}_invalid_json", f"{what} contains {token}, which is not JSON", what)

    def finite(token: str) -> float:
        number = float(token)
        return number if math.isfinite(number) else constant(shown(token))

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{what}_invalid_utf8", f"{what} is not UTF-8: {error}", what) from None
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=finite)
        # \ud800 escapes pass the parser and break every later .encode(): find them here, once.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what}_invalid_json", f"{what} is not valid JSON: {shown(str(error))}", what) from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{what}_not_object", f"{what} must be a JSON object, got {shown(value)}", what)
    return value

"""Every field of every request has a bound: the page that describes them is walked, to the last leaf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.api.conftest import LiveServer

FREE = {
    ("rows",): "a row's values: checked line by line, by the task",
    ("method",): "a method's hyperparameters: checked by the method",
    ("distill",): "checked as a whole",
    ("integrations",): "must be empty",
}
"""Fields whose values have a schema of their own elsewhere, within the largest body."""


def resolved(schema: dict[str, Any], page: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference."""
    while "$ref" in schema:
        found: Any = page
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema


def unbounded(schema: dict[str, Any], page: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Yield the leaves that may be of any size."""
    schema = resolved(schema, page)
    where = ".".join(path)
    for key in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(key, ()):
            yield from unbounded(one, page, path)
    if any(key in schema for key in ("anyOf", "oneOf", "allOf", "enum", "const")):
        return
    kind = schema.get("type")
    if kind == "string":
        is_file = schema.get("format") == "binary" or "contentMediaType" in schema  # counted as it comes
        if "maxLength" not in schema and "pattern" not in schema and not is_file:
            yield where
    elif kind == "array":
        if "maxItems" not in schema:
            yield where
        if schema.get("maxItems") != 0:
            yield from unbounded(schema.get("items", {}), page, (*path, "[]"))
    elif kind in ("integer", "number"):
        low, high = {"minimum", "exclusiveMinimum"} & set(schema), {"maximum", "exclusiveMaximum"} & set(schema)
        if not (low and high):
            yield where
    elif kind == "object":
        for name, one in schema.get("properties", {}).items():
            yield from unbounded(one, page, (*path, name))
        more = schema.get("additionalProperties", True)
        if more is not False and "maxProperties" not in schema:
            yield where
        if isinstance(more, dict) and more:
            yield from unbounded(more, page, (*path, "*"))
    elif kind not in ("boolean", "null") and not any(set(free) & set(path) for free in FREE):
        yield where


def leaves(page: dict[str, Any]) -> list[str]:
    """Every unbounded leaf of every request."""
    found: list[str] = []
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            name = f"{method.upper()} {path}"
            for one in operation.get("parameters", ()):
                if one["in"] != "path":  # parsed as names and ids, and never longer than a request's first line
                    found += unbounded(one["schema"], page, (name, one["name"]))
            for content in operation.get("requestBody", {}).get("content", {}).values():
                found += unbounded(content["schema"], page, (name,))
    return found


def test_every_field_is_bounded(server: LiveServer) -> None:
    """Strings, lists, numbers, objects; a schema with a hole in it is found (the control)."""
    with server.http() as http:
        page = http.get("/openapi.json").json()
    found = leaves(page)
    assert found == [], found
    hole = {"requestBody": {"content": {"application/json": {"schema": {"type": "string"}}}}}
    assert leaves({**page, "paths": {"/x": {"post": hole}}}) == ["POST /x"]

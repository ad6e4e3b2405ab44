"""server/docs/api.md, written from the OpenAPI document: `python -m tests.docs.api_reference` writes it anew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from promptd.api.routes import ROUTES
from promptd.app import create_app
from promptd.settings import Settings
from tests.docs.pages import DOCS

PAGE = DOCS / "api.md"
HEAD = r"""# The HTTP API

Made from the OpenAPI document by `python -m tests.docs.api_reference`;
a server shows the same at `/docs` and `/openapi.json`.

- **Who.** `Authorization: Bearer KEY`; each route says which scope the key needs. A server on loopback without keys
  is open.
- **Bodies** are JSON. Fields and query parameters that are not listed are refused by name (probes take any), and `"3"`
  or `true` is no number.
- **Errors** are `{"error": {"message", "type", "param", "code"}}`, with 4xx where the request is wrong
  and 5xx where the server could not do it. 429 and 503 say in `Retry-After` when to come again, where waiting helps.
- **Every answer** has `X-Request-Id`; one that was sent along comes back.
- **Prompts' names** are `[tenant/]name`, and a version of it `name@2` or `name@sha256:…`.
"""
TITLES = {
    "inference": "Ask",
    "models": "Models",
    "prompts": "Prompts",
    "training": "Files and training jobs",
    "usage": "Usage",
    "admin": "Administration",
    "health": "Health",
}
Schema = Mapping[str, Any]
_MANY = 1 << 20
"""A bound that only keeps a server from harm."""


def write() -> str:
    """Return the page."""
    document = create_app(Settings(model=None, training="off")).openapi()
    scopes = {(route.path.replace(":path", ""), route.method.lower()): route.scope.value for route in ROUTES}
    sections: dict[str, list[str]] = {title: [] for title in TITLES.values()}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            section = sections[TITLES[operation["tags"][0]]]
            section += _operation(document, method, path, operation, scopes[path, method])
    text = [HEAD]
    for title, lines in sections.items():
        text += [f"## {title}\n", *lines]
    return "\n".join(text).rstrip() + "\n"


def _operation(document: Schema, method: str, path: str, operation: Schema, scope: str) -> Iterator[str]:
    yield f"### `{method.upper()} {path}`\n"
    needs = "Needs no key." if scope == "open" else f"Scope `{scope}`."
    yield f"{_plain(operation.get('description', ''))} {needs}\n".lstrip()
    parameters = [p for p in operation.get("parameters", []) if p["in"] == "query"]
    if parameters:
        rows = [_row(document, p["name"], p["schema"], p.get("required", False)) for p in parameters]
        yield from _table("query", rows)
    for content_type, body in operation.get("requestBody", {}).get("content", {}).items():
        schema = _resolved(document, body.get("schema", {}))
        if "properties" in schema:
            required = schema.get("required", [])
            names = sorted(schema["properties"], key=lambda name: name not in required)
            rows = [_row(document, name, schema["properties"][name], name in required) for name in names]
            yield from _table("field" if content_type == "application/json" else f"`{content_type}`", rows)
        else:
            yield f"Body: `{content_type}`.\n"
    kinds = {
        f"{status} `{kind}`": None
        for status, response in operation["responses"].items()
        if not status.endswith("XX") and status != "422"
        for kind in response.get("content", {"-": None})
    }
    yield f"Answers {', '.join(kinds)}.\n".replace(" `-`", "")


def _table(head: str, rows: list[str]) -> Iterator[str]:
    yield f"| {head} | type | |\n| --- | --- | --- |"
    yield from rows
    yield ""


def _row(document: Schema, name: str, schema: Schema, is_required: bool) -> str:
    notes = ["required"] if is_required else []
    if schema.get("default") not in (None, [], {}):
        notes.append(f"default `{json.dumps(schema['default'])}`")
    notes = [", ".join(notes) + "."] if notes else []
    if "description" in schema:
        notes.append(_plain(schema["description"]))
    return f"| `{name}` | {_type(document, schema)} | {' '.join(notes)} |".replace("|  |", "| |")


def _type(document: Schema, schema: Schema) -> str:
    """Return a type in a few words; the bounds that a person may meet are part of it."""
    schema = _resolved(document, schema)
    if "anyOf" in schema:
        kinds = [_type(document, each) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "anything")
    if kind == "array":
        items = _type(document, schema.get("items", {}))
        items = f"({items})" if " " in items else items
        most = schema.get("maxItems", _MANY)
        return f"list of {items}" + (f", up to {most:,}" if most < _MANY else "")
    if kind == "object" and "properties" in schema:
        return "{" + ", ".join(f"`{name}`" for name in schema["properties"]) + "}"
    if kind == "string":
        return "bytes" if schema.get("format") == "binary" else "text"
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if high is not None:
        return f"{kind}, {low:g} to {high:g}" if high < _MANY else f"{kind}, {low:g} or more"
    return kind


def _resolved(document: Schema, schema: Schema) -> Schema:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _plain(text: str) -> str:
    """Return a docstring as one paragraph of a table's cell."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(write())

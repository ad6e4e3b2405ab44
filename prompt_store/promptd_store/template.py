"""Templates with plain named fields: `"Review: {text}\\nSentiment:"`. No attributes, no indexes, no formats."""

from __future__ import annotations

import re
from collections.abc import Mapping

from promptd_store.errors import TemplateError

MAX_TEMPLATE_CHARS = 32_768
MAX_RENDERED_CHARS = 1 << 21
"""A field may stand in a template thousands of times: the text is bounded, not only its parts."""

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal text, field after it or None)."""
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateError(
            f"template has {len(template)} characters, at most {MAX_TEMPLATE_CHARS} are allowed",
            code="template_too_large",
            param="template",
        )
    parts: list[tuple[str, str | None]] = []
    literal, last = "", 0
    for match in _TOKEN.finditer(template):
        literal += template[last : match.start()]
        last = match.end()
        token, field = match.group(), match.group(1)
        if token in ("{{", "}}"):
            literal += token[0]
        elif field is None:
            raise TemplateError(
                f"template has a single {token!r} at character {match.start()}; write {token * 2!r} for a literal one",
                param="template",
            )
        elif not _FIELD.fullmatch(field):
            raise TemplateError(
                f"template field {field[:64]!r} is not a plain name (letters, digits, underscore)", param="template"
            )
        else:
            parts.append((literal, field))
            literal = ""
    parts.append((literal + template[last:], None))
    return parts


def template_fields(template: str | None) -> tuple[str, ...]:
    """Return the names that a template uses, each once, in order; None is the identity template `{text}`."""
    if template is None:
        return ("text",)
    return tuple(dict.fromkeys(field for _, field in _parse(template) if field is not None))


def render_template(template: str | None, fields: Mapping[str, str]) -> str:
    """Put the fields into the template; None stands for `{text}`. Values are inserted as they are, never re-read."""
    rendered: list[str] = []
    num_chars = 0
    for literal, field in [("", "text")] if template is None else _parse(template):
        rendered.append(literal)
        if field is None:
            continue
        if field not in fields:
            raise TemplateError(
                f"template field {field!r} was not given; given: {sorted(fields)[:16]!r}",
                code="template_field_missing",
                param=field,
            )
        value = fields[field]
        if not isinstance(value, str):
            raise TemplateError(f"template field {field!r} must be a string, got {value!r:.80}", param=field)
        rendered.append(value)
        num_chars += len(value)
        if num_chars > MAX_RENDERED_CHARS:
            raise TemplateError(
                f"the template makes more than {MAX_RENDERED_CHARS} characters of these fields",
                code="rendered_text_too_large",
                param=field,
            )
    return "".join(rendered)

"""JSON texts that are one line to every reader.

JSON escapes the line breaks of ASCII. It lets NEL (U+0085) and the line and paragraph separators (U+2028, U+2029)
stand in strings as they are, and a model may write them. `str.splitlines`, and httpx's `iter_lines` with it, end a line
there: a reader of events or of JSON lines would be handed half an object.
"""

from __future__ import annotations

import json
from typing import Any


def one_line(text: str) -> str:
    """Escape what ends a line in a JSON text; these characters stand in nothing but its strings."""
    if text.isascii():
        return text
    return text.replace("\x85", r"\u0085").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")


def json_line(value: Any) -> str:
    """Serialise a value as one line, without its end."""
    return one_line(json.dumps(value, ensure_ascii=False))

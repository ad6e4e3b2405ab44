"""Whether what a page shows is what was printed: words exactly, numbers nearly, what differs each time not at all."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

ANY = "…"
"""Stands in a page for whatever is printed there."""
RELATIVE, ABSOLUTE = 0.02, 1e-3
"""How far numbers may lie from the page's: other machines round sums differently, and scores follow."""

_VOLATILE = (
    (r"\b(classify|cmpl|chatcmpl|embd|file|ftjob|ftevent|ftckpt)-[0-9a-f]{8,32}\b", r"\1-ID"),
    (r'("?created(?:_at)?"?\s*[:=]\s*)\d+', r"\1TIME"),
    (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d[\d:.Z+-]*", "TIME"),
    (r"\b\d+(\.\d+)?( ?)(s|ms|min)\b", r"SECONDS\2\3"),
    (r"\bpd_[0-9A-Za-z_]{20,}", "KEY"),
    (r"\b\d+(\.\d+)? (requests|tokens|rows)/s\b", r"RATE \2/s"),
)
_TOKEN = re.compile(r"…|\d+\.\d+(?:e[+-]?\d+)?|[A-Za-z_]*\d+[A-Za-z_0-9]*|[^\W\d]+|\S")


@dataclass(frozen=True)
class Shown:
    """Output as a page shows it; spaces and line breaks do not count."""

    text: str
    numbers_vary: bool = False

    def matches(self, printed: str) -> bool:
        """Tell whether this was printed. A page that shows nothing says nothing."""
        if not self.text.strip():
            return True
        real, at = _tokens(printed), 0
        first, *others = _split(_tokens(self.text))
        if not self._equal(real[: len(first)], first):
            return False
        at = len(first)
        for number, part in enumerate(others):
            is_last = number == len(others) - 1
            starts = [max(len(real) - len(part), at)] if is_last else range(at, len(real) - len(part) + 1)
            start = next((start for start in starts if self._equal(real[start : start + len(part)], part)), None)
            if start is None:
                return False
            at = start + len(part)
        return at == len(real)

    def _equal(self, real: Sequence[str], shown: Sequence[str]) -> bool:
        return len(real) == len(shown) and all(map(self._same, real, shown))

    def _same(self, real: str, shown: str) -> bool:
        one, other = _number(real), _number(shown)
        if one is None or other is None:
            return real == shown
        if self.numbers_vary:
            return True
        if "." not in real + shown:  # counts
            return one == other
        return math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def _tokens(text: str) -> list[str]:
    for pattern, word in _VOLATILE:
        text = re.sub(pattern, word, text)
    return _TOKEN.findall(text)


def _split(tokens: Sequence[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for token in tokens:
        if token == ANY:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _number(token: str) -> float | None:
    try:
        return float(token)
    except ValueError:
        return None

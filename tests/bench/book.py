"""Results on disk, written after every measurement, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table: what was asked for, what was measured; `is_met` is None for a line that only informs."""

    check: str
    target: str
    measured: str
    is_met: bool | None = None


class Book:
    """Series of numbers and facts by name, for one setting (model sizes, threads)."""

    def __init__(self, path: Path, setting: str) -> None:
        self._path = path
        self._all: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        self._own = self._all.setdefault(setting, {})

    def series(self, name: str) -> list[float]:
        """Return the numbers noted so far."""
        return list(self._own.get(name, ()))

    def add(self, name: str, values: Sequence[float]) -> None:
        """Append to a series."""
        self._own.setdefault(name, []).extend(values)
        self._save()

    def note(self, name: str, value: Any) -> None:
        """Keep one fact."""
        self._own[name] = value
        self._save()

    def fact(self, name: str) -> Any:
        """Return a fact, or None."""
        return self._own.get(name)

    def to_json(self) -> str:
        """Return all of this setting as text."""
        return json.dumps(self._own, indent=1) + "\n"

    def forget(self) -> None:
        """Begin anew."""
        self._own.clear()
        self._save()

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self._all, indent=1) + "\n")
        fresh.replace(self._path)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of ours / theirs, both taken in the same round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    marks = {True: "yes", False: "**no**", None: ""}
    lines = ["| check | target | measured | met |", "|---|---|---|---|"]
    lines += [f"| {row.check} | {row.target} | {row.measured} | {marks[row.is_met]} |" for row in rows]
    return "\n".join(lines)

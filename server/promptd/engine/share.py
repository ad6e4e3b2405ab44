"""Whose work a request is. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from promptd.errors import InvalidRequestError

MAX_PRIORITY = 9


@dataclass(frozen=True, slots=True)
class Share:
    """An opaque key, and how much service it gets beside others: twice the weight, twice the tokens."""

    key: str = ""
    weight: float = 1.0
    max_waiting: int | None = None
    """Requests that may wait beside those that run; beyond it the newest is refused."""
    max_resident_bytes: int | None = None
    """K/V of prompts that may be resident under its own salt."""

    def __post_init__(self) -> None:
        if not 0.0 < self.weight <= 1e6:
            raise InvalidRequestError(f"weight must be above 0 and at most 1e6, got {self.weight}", param="weight")


EVERYBODY = Share()

"""Whose work a request is. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from promptd.errors import InvalidRequestError

MAX_PRIORITY = 9


class Places(Protocol):
    """Who may wait beside those that run. Others than the engine may have to be asked; it never waits for them."""

    @property
    def limit(self) -> int:
        """How many places there may be in all."""
        ...

    def surplus(self, num_waiting: int) -> int:
        """Return how many of those that wait have to go now; asked after each step, on the engine's thread."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """An opaque key, and how much service it gets beside others: twice the weight, twice the tokens."""

    key: str = ""
    weight: float = 1.0
    places: Places | None = None
    """For requests that wait; those without one are refused, the newest first. None: any number may wait."""
    max_resident_bytes: int | None = None
    """K/V of prompts that may be resident under its own salt."""

    def __post_init__(self) -> None:
        if not 0.0 < self.weight <= 1e6:
            raise InvalidRequestError(f"weight must be above 0 and at most 1e6, got {self.weight}", param="weight")


EVERYBODY = Share()

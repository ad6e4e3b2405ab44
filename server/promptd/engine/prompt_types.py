"""What the scheduler needs of the prompt cache, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Prompts(Protocol):
    """Resident prompts: see `prompt_cache.PromptCache`."""

    @property
    def loading(self) -> Sequence[Any]:
        """Entries whose K/V is not complete yet, parents before children."""

    def acquire(self, salt: str, segments: Any, max_bytes: int | None = None) -> Sequence[Any] | None:
        """Pin a chain; None where there is no room now."""

    def release(self, chain: Sequence[Any]) -> None:
        """Unpin a chain."""

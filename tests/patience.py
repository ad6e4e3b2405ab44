"""What comes about sooner or later is waited for; on a busy machine, later."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_SECONDS = 60


def until(
    is_true: Callable[[], object],
    what: object = "it never came true",
    *,
    seconds: float = PATIENCE_SECONDS,
    pause_seconds: float = 0.005,
) -> None:
    """Wait for what another thread or process brings about; returns as soon as it has."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, what
        time.sleep(pause_seconds)

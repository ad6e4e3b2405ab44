"""How the learning rate moves over a training: up during warm-up, then constant, linearly down, or down a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

ScheduleName = Literal["linear", "cosine", "constant"]

SCHEDULES: Mapping[ScheduleName, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}
"""Name -> share of the full rate when that share of the time after warm-up lies behind, both 0 to 1."""


def rate_scale(schedule: ScheduleName, done: float, warmup_ratio: float) -> float:
    """Return the share of the full rate, 0 to 1, when `done` of the training (0 to 1) lies behind.

    During the first `warmup_ratio` of it the rate rises linearly from 0.
    """
    if done < warmup_ratio:
        return done / warmup_ratio
    return SCHEDULES[schedule]((done - warmup_ratio) / (1 - warmup_ratio))

"""Means with confidence intervals, and how many steps a curve takes to a loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its interval of Student's t; None where one value says nothing of spread."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Summarize independent values. Raises `ValueError` where there are none."""
        count = len(values)
        if count == 0:
            raise ValueError("no values")
        if count < 2:
            return cls(values[0], None, count)
        quantile = float(t.ppf((1 + CONFIDENCE) / 2, count - 1))
        return cls(statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(count), count)

    def shown(self, digits: int, scale: float = 1.0) -> str:
        """Return `mean ± half`."""
        if self.half is None:
            return f"{self.mean * scale:.{digits}f}"
        return f"{self.mean * scale:.{digits}f} ± {self.half * scale:.{digits}f}"

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies on one side of 0, else 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def best_loss(result: dict[str, Any]) -> float:
    """Return the lowest validation loss of a training, in terms of what it minimizes."""
    return min(float(point[1]) for point in result["curve"])


def steps_to(result: dict[str, Any], loss: float) -> int | None:
    """Return the first measured step whose validation loss is at most `loss`; None: never."""
    return next((int(point[0]) for point in result["curve"] if point[1] <= loss), None)

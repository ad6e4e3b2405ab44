"""What a worker counts; the edge turns it into metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class TrainingCounters:
    """Totals since the start, written on the worker's event loop alone."""

    steps: int = 0
    tokens: int = 0
    """Text tokens of those steps."""
    step_seconds: float = 0.0
    """Seconds of those steps, each job's own: two that share a pass both wait for it."""
    leases_lost: int = 0
    """Jobs that another worker took because this one did not renew its claim in time."""
    left: Counter[str] = field(default_factory=Counter)
    """State -> jobs that this worker was done with in that state; one that is queued again was given back."""

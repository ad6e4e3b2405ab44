"""Rates: every learner has as many as the others, each is tried with seed 0, and rows that select choose one.

The best is then run with the other seeds. Reporting rows choose nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tests.bench.experiments.cells import Cell, Results
from tests.bench.experiments.plans import Line
from tests.bench.experiments.run import Laboratory

Tried = Mapping[float, Cell]
"""rate -> its cell with seed 0."""


def plan_rates(tried: Sequence[tuple[str, Tried]], num_seeds: int, results: Results) -> list[Line]:
    """Return the cells of these labels' sweeps that can be named yet: all rates, and where these have run, the best.

    A run that ends early has whole seeds.
    """
    found = [(f"{label} @ {rate:g}", cell) for label, own in tried for rate, cell in own.items()]
    for seed in range(num_seeds):
        for label, own in tried:
            best = best_rate(own, results)
            if best is not None:
                found.append((label, dataclasses.replace(own[best], seed=seed)))
    return found


def best_rate(tried: Tried, results: Results) -> float | None:
    """Return the rate that is best on the selection rows; None while one has not run, or where none came to an end."""
    ranks = {}
    for rate, cell in tried.items():
        result = results.get(cell)
        if result is None:
            return None
        if "error" not in result:
            ranks[rate] = selected(result)
    return max(ranks, key=lambda rate: ranks[rate]) if ranks else None


def selected(result: Mapping[str, Any]) -> tuple[float, float]:
    """Larger is better: accuracy, then the loss, of the kept step on the selection rows."""
    (accuracy, loss) = next((point[3], point[2]) for point in result["curve"] if point[0] == result["best_step"])
    return (accuracy or 0.0, -loss)


def run_lines(
    laboratory: Laboratory, results: Results, plan: Callable[[], Iterable[Line]], until: float | None
) -> bool:
    """Run what a plan lacks, as it grows; False where `until` (of `time.monotonic`) came first."""
    while missing := [cell for _, cell in plan() if results.get(cell) is None]:
        if (until is not None and time.monotonic() > until) or not laboratory.run(missing, until):
            return False
    return True

"""SuperGLUE: which cells it takes, and how they are run. Every learner has as many rates as the others.

Each rate is tried with seed 0; the one that is best on the selection rows, by accuracy and then by loss, is run with
the other seeds too. Reporting rows choose nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptd.training import MethodConfig, PrefixTuningConfig, PromptTuningConfig, ResidualConfig
from tests.bench.experiments.ablations import MlpConfig
from tests.bench.experiments.cells import Cell, ContextConfig, Learner, Results
from tests.bench.experiments.plans import BARE, FULL_TUNING, LORA, MLP, PREFIX, PT, RPT, Line, Scale
from tests.bench.experiments.run import Laboratory
from tests.bench.experiments.superglue_sets import SUPERGLUE, TITLES, Format, count_rows
from tests.bench.experiments.weights import WeightConfig

NAME = "superglue"
MAX_SELECTION_ROWS, MAX_REPORTING_ROWS = 50, 250
MAX_EVALUATIONS = 4
COUNTS = "superglue.json"
"""Beside the results: how many rows each task had."""

LEARNERS: Mapping[str, MethodConfig | WeightConfig] = {
    PT: PromptTuningConfig(),
    RPT: ResidualConfig(network_learning_rate=3e-3),
    MLP: MlpConfig(network_learning_rate=3e-3),
    PREFIX: PrefixTuningConfig(),
    LORA: WeightConfig("lora", 1e-3, target_modules=()),
    FULL_TUNING: WeightConfig("full", 1e-4),
}
RATES: Mapping[str, tuple[float, ...]] = {
    PT: (0.3, 3.0),
    RPT: (0.3, 3.0),
    MLP: (0.3, 3.0),
    PREFIX: (0.03, 0.3),
    LORA: (1e-3, 3e-3),
    FULL_TUNING: (1e-4, 3e-4),
}


@dataclass(frozen=True)
class Asked:
    """What of it is wanted."""

    scale: Scale
    how: Format
    tasks: Sequence[str] = tuple(TITLES)
    learners: Sequence[str] = tuple(LEARNERS)

    @property
    def sets(self) -> dict[str, str]:
        """Task -> the name of its set in this format; there is none for ReCoRD under a head."""
        return {task: f"{task}-{self.how}" for task in self.tasks if f"{task}-{self.how}" in SUPERGLUE}


def plan(asked: Asked, results: Results) -> list[Line]:
    """Return the cells that can be named yet: all rates with seed 0, and where these have run, the best with others."""
    found: list[Line] = []
    for task in asked.sets:
        for label in asked.learners:
            found += [(f"{label} @ {rate:g}", cell) for rate, cell in _rates(asked, task, label).items()]
        if asked.how == "text":
            found.append((BARE, _cell(asked, task, ContextConfig("bare"), 0)))
    for seed in range(asked.scale.num_seeds):  # a run that ends early has whole seeds
        for task, label in itertools.product(asked.sets, asked.learners):
            best = best_rate(asked, task, label, results)
            if best is not None:
                found.append((label, dataclasses.replace(_rates(asked, task, label)[best], seed=seed)))
    return found


def best_rate(asked: Asked, task: str, label: str, results: Results) -> float | None:
    """Return the rate that is best on the selection rows; None while one has not run, or where none came to an end."""
    ranks = {}
    for rate, cell in _rates(asked, task, label).items():
        result = results.get(cell)
        if result is None:
            return None
        if "error" not in result:
            ranks[rate] = _rank(result)
    return max(ranks, key=lambda rate: ranks[rate]) if ranks else None


def _rank(result: Mapping[str, Any]) -> tuple[float, float]:
    """Larger is better: what the kept step has on the selection rows."""
    (accuracy, loss) = next((point[3], point[2]) for point in result["curve"] if point[0] == result["best_step"])
    return (accuracy or 0.0, -loss)


def run_all(laboratory: Laboratory, results: Results, data: Path, asked: Asked, until: float | None) -> bool:
    """Run what is missing; False where the time was up. Tasks without their files are named and left out.

    Raises `ValueError` where no task has its files.
    """
    counts = count_rows(data)
    for task, count in counts.items():
        if isinstance(count, str):
            print(f"    {TITLES[task]}: not available ({count})", flush=True)
        elif task not in asked.sets:
            print(f"    {TITLES[task]}: left out", flush=True)
    there = {task: count for task, count in counts.items() if not isinstance(count, str)}
    if not there:
        raise ValueError(f"{data} has no task of SuperGLUE")
    results.folder.mkdir(parents=True, exist_ok=True)
    (results.folder / COUNTS).write_text(json.dumps(there, indent=1) + "\n", encoding="utf-8")
    asked = dataclasses.replace(asked, tasks=[task for task in asked.tasks if task in there])
    while missing := _missing(plan(asked, results), results):
        if (until is not None and time.monotonic() > until) or not laboratory.run(missing, until):
            return False
    return True


def _missing(lines: Iterable[Line], results: Results) -> list[Cell]:
    return [cell for _, cell in lines if results.get(cell) is None]


def _rates(asked: Asked, task: str, label: str) -> dict[float, Cell]:
    return {
        rate: _cell(asked, task, dataclasses.replace(LEARNERS[label], learning_rate=rate), 0) for rate in RATES[label]
    }


def _cell(asked: Asked, task: str, learner: Learner, seed: int) -> Cell:
    scale, chosen = asked.scale, SUPERGLUE[asked.sets[task]]
    return Cell(
        task=chosen.name, learner=learner, seed=seed, num_train=scale.num_train,
        num_steps=0 if isinstance(learner, ContextConfig) else min(chosen.num_steps, scale.max_steps),
        batch_size=scale.batch_size, num_validation=min(scale.num_validation, MAX_SELECTION_ROWS),
        num_held_out=min(scale.num_held_out, MAX_REPORTING_ROWS),
        num_evaluations=min(scale.num_evaluations, MAX_EVALUATIONS),
        schedule=scale.schedule,
    )  # fmt: skip

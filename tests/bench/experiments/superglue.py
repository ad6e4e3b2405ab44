"""SuperGLUE: which cells it takes, and how they are run. Every learner has as many rates as the others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from promptd.training import MethodConfig, PrefixTuningConfig, PromptTuningConfig, ResidualConfig
from tests.bench.experiments.ablations import MlpConfig
from tests.bench.experiments.cells import Cell, ContextConfig, Learner, Results
from tests.bench.experiments.choice import plan_rates, run_lines
from tests.bench.experiments.plans import BARE, FULL_TUNING, LORA, MLP, PREFIX, PT, RPT, Line, Scale
from tests.bench.experiments.run import Laboratory
from tests.bench.experiments.superglue_sets import SUPERGLUE, TITLES, Format, count_rows
from tests.bench.experiments.weights import WeightConfig

NAME = "superglue"
MAX_SELECTION_ROWS, MAX_REPORTING_ROWS = 50, 250
MAX_EVALUATIONS = 4
STEPS_BETWEEN_EVALUATIONS, PATIENCE = 20, 5
"""Of trainings of many steps, which end where they no longer gain."""
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
    sets = asked.sets
    bare = [(BARE, _cell(asked, task, ContextConfig("bare"), 0)) for task in sets if asked.how == "text"]
    tried = [(label, rates_of(asked, task, label)) for task in sets for label in asked.learners]
    return [*bare, *plan_rates(tried, asked.scale.num_seeds, results)]


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
    return run_lines(laboratory, results, lambda: plan(asked, results), until)


def rates_of(asked: Asked, task: str, label: str) -> dict[float, Cell]:
    """Return a learner's cell with seed 0 at each of its rates."""
    return {
        rate: _cell(asked, task, dataclasses.replace(LEARNERS[label], learning_rate=rate), 0) for rate in RATES[label]
    }


def _cell(asked: Asked, task: str, learner: Learner, seed: int) -> Cell:
    scale, chosen = asked.scale, SUPERGLUE[asked.sets[task]]
    num_steps = 0 if isinstance(learner, ContextConfig) else min(chosen.num_steps, scale.max_steps)
    is_long = num_steps > MAX_EVALUATIONS * STEPS_BETWEEN_EVALUATIONS
    return Cell(
        task=chosen.name, learner=learner, seed=seed, num_train=scale.num_train,
        num_steps=num_steps,
        batch_size=scale.batch_size, num_validation=min(scale.num_validation, MAX_SELECTION_ROWS),
        num_held_out=min(scale.num_held_out, MAX_REPORTING_ROWS),
        num_evaluations=num_steps // STEPS_BETWEEN_EVALUATIONS
        if is_long
        else min(scale.num_evaluations, MAX_EVALUATIONS),
        schedule=scale.schedule, patience=PATIENCE if is_long else None,
    )  # fmt: skip

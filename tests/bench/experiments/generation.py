"""Generation on few rows and on many: prompts against fine-tuning, as in prefix-tuning's low-data experiments.

A set's sizes are numbers of training rows. Steps end early where the selection rows no longer gain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from promptd.training import MethodConfig, PrefixTuningConfig, PromptTuningConfig, ResidualConfig
from tests.bench.experiments.cells import Cell, ContextConfig, Learner, Results
from tests.bench.experiments.choice import plan_rates
from tests.bench.experiments.plans import BARE, FULL_TUNING, PREFIX, PT, RPT, Line, Scale
from tests.bench.experiments.text_sets import TEXT_SETS
from tests.bench.experiments.weights import WeightConfig

NAME = "generation"
NUM_SELECTION, NUM_REPORTING = 40, 120
"""Inputs."""
STEPS_BETWEEN_EVALUATIONS = 10
PATIENCE = 4
MANY_STEPS_FACTOR = 2
"""Of a set's steps, where all rows are there."""

SIZES: Mapping[str, tuple[int | None, ...]] = {
    "e2e-texts": (50, 100, 200, 500, None),
    "webnlg-texts": (200, None),
    "headlines-texts": (200, None),
}
"""Training rows; None: all that there are."""

LEARNERS: Mapping[str, Mapping[float, MethodConfig | WeightConfig]] = {
    PT: {rate: PromptTuningConfig(learning_rate=rate) for rate in (1.0, 3.0, 10.0)},
    RPT: {rate: ResidualConfig(learning_rate=rate, network_learning_rate=3e-3) for rate in (1.0, 3.0, 10.0)},
    PREFIX: {
        rate: PrefixTuningConfig(learning_rate=100 * rate, network_learning_rate=rate) for rate in (1e-3, 3e-3, 1e-2)
    },
    FULL_TUNING: {rate: WeightConfig("full", rate) for rate in (1e-4, 3e-4, 1e-3)},
}
"""label -> rate -> learner; prefix-tuning's is its network's."""


@dataclass(frozen=True)
class Asked:
    """What of it is wanted."""

    scale: Scale
    sets: Sequence[str] = tuple(SIZES)
    learners: Sequence[str] = tuple(LEARNERS)
    sizes: Sequence[int] | None = None
    """These alone; 0: all rows."""
    mark: str = NAME
    """What begins the names of tables and files: a model that is not the embedded one has its own."""

    def sizes_of(self, name: str) -> list[int | None]:
        """Return the sizes of a set, the smallest first."""
        known = SIZES[name] if self.scale.generation_sizes is None else self.scale.generation_sizes
        return [size for size in known if self.sizes is None or (size or 0) in self.sizes]


def plan(asked: Asked, results: Results) -> list[Line]:
    """Return the cells that can be named yet, size by size."""
    pairs = [(name, size) for name in asked.sets for size in asked.sizes_of(name)]
    bare = [(BARE, cell_of(asked, name, asked.sizes_of(name)[0], ContextConfig("bare"))) for name in asked.sets]
    tried = [(label, rates_of(asked, name, size, label)) for name, size in pairs for label in asked.learners]
    return [*bare, *plan_rates(tried, asked.scale.num_seeds, results)]


def rates_of(asked: Asked, name: str, size: int | None, label: str) -> dict[float, Cell]:
    """Return a learner's cell with seed 0 at each of its rates."""
    return {rate: cell_of(asked, name, size, learner) for rate, learner in LEARNERS[label].items()}


def cell_of(asked: Asked, name: str, size: int | None, learner: Learner) -> Cell:
    """Return the cell with seed 0. Of all rows, those are drawn that the steps can read, each once."""
    scale = asked.scale
    num_steps = min(TEXT_SETS[name].num_steps * (1 if size else MANY_STEPS_FACTOR), scale.max_steps)
    cell = Cell(
        task=name, learner=learner, seed=0, num_train=size or num_steps * scale.batch_size, num_steps=num_steps,
        batch_size=scale.batch_size, num_validation=min(scale.num_validation, NUM_SELECTION),
        num_held_out=min(scale.num_held_out, NUM_REPORTING),
        num_evaluations=max(1, num_steps // STEPS_BETWEEN_EVALUATIONS), schedule=scale.schedule, patience=PATIENCE,
    )  # fmt: skip
    if isinstance(learner, ContextConfig):  # whatever would train, nothing does
        return dataclasses.replace(cell, num_train=0, num_steps=0, num_evaluations=0)
    return cell

"""One cell is one training (or one way without training) on one task with one seed; its result is one JSON file.

Experiments name the cells they need; a cell that several experiments name is run once. What is there is never run
again, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from promptd.training import MethodConfig
from promptd.training.schedules import ScheduleName
from tests.bench.experiments.infix import InfixConfig
from tests.bench.experiments.weights import WeightConfig


@dataclass(frozen=True)
class ContextConfig:
    """Nothing is trained: the bare model, a hand-written instruction in front, or examples in front."""

    kind: Literal["bare", "instruction", "examples"]

    @property
    def name(self) -> str:
        """How results name the learner's kind."""
        return self.kind


Learner = MethodConfig | WeightConfig | ContextConfig | InfixConfig


@dataclass(frozen=True)
class Cell:
    """What is run. Equal cells are one file."""

    task: str
    learner: Learner
    seed: int
    num_train: int
    num_steps: int
    batch_size: int
    num_validation: int
    num_held_out: int
    num_evaluations: int
    schedule: ScheduleName
    num_per_label: int | None = None
    patience: int | None = None
    """A training ends after so many evaluations in a row that are not its best so far."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `learner` holds the method's name too.

        What was run before there were tokens for targets, or patience, keeps its name.
        """
        learner = {"name": self.learner.name, **asdict(self.learner)}
        if not learner.get("num_target_tokens"):
            learner.pop("num_target_tokens", None)
        found = {**asdict(self), "learner": learner}
        if self.patience is None:
            del found["patience"]
        return found

    @property
    def file_name(self) -> str:
        """Readable, and different for different cells."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.task}/{self.learner.name}-{self.seed}-{digest}.json"


class Results:
    """The results of one base model, a file a cell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell's result, or None."""
        path = self.folder / cell.file_name
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Write a cell's result, whole or not at all."""
        path = self.folder / cell.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps({"cell": cell.to_json(), **result}, indent=1) + "\n")
        partial.replace(path)

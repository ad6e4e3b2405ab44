"""The trainer behind an inbox: any thread adds and removes jobs, one thread runs passes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from promptd.modeling import FrozenModel
from promptd.training.job import TrainingJob, Watcher
from promptd.training.passes import BetweenLayers
from promptd.training.trainer import MAX_PASS_TOKENS, Outcome, Trainer


class TrainingLoop:
    """Runs as an engine's spare time.

    `strict` gives every job passes of its own: then its prompt is bit for bit the one of a run alone.
    """

    def __init__(self, model: FrozenModel, *, strict: bool = False) -> None:
        self.model = model
        self.wake: Callable[[], None] = lambda: None
        """Called when there is work: set by whoever runs the loop."""
        self._trainer = Trainer(model, max_pass_tokens=0 if strict else MAX_PASS_TOKENS)
        self._inbox: deque[Callable[[], None]] = deque()
        self._on_outcome: dict[str, Callable[[Outcome], None]] = {}
        self._pass_began: float | None = None

    @property
    def has_work(self) -> bool:
        """Whether `run` has anything to do."""
        return bool(self._inbox) or self._trainer.has_work

    def add(self, job_id: str, job: TrainingJob, watcher: Watcher, on_outcome: Callable[[Outcome], None]) -> None:
        """Start a job; from any thread. The outcome, and what the watcher gets, come from the running thread."""

        def enter() -> None:
            self._on_outcome[job_id] = on_outcome
            self._trainer.add(job_id, job, watcher)

        self._put(enter)

    def remove(self, job_id: str) -> None:
        """Drop a job before the next pass; from any thread. It has no outcome then, unless it has one already."""

        def leave() -> None:
            self._on_outcome.pop(job_id, None)
            self._trainer.remove(job_id)

        self._put(leave)

    def run(self, between_layers: BetweenLayers | None = None) -> None:
        """Take in what has come and run one pass."""
        self._pass_began = time.monotonic()
        while self._inbox:
            self._inbox.popleft()()
        for job_id, outcome in self._trainer.run_pass(between_layers).items():
            self._on_outcome.pop(job_id)(outcome)
        self._pass_began = None

    def seconds_in_pass(self) -> float:
        """How long the present pass has taken; 0.0 between two. From any thread."""
        began = self._pass_began
        return 0.0 if began is None else time.monotonic() - began

    def _put(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self.wake()

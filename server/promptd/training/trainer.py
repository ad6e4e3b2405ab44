"""Runs the training jobs of many users on one frozen model, a shared pass at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from promptd.modeling import FrozenModel
from promptd.training.job import TrainingJob, Watcher
from promptd.training.passes import BetweenLayers, Share, Shares, run_what_fits
from promptd.training.result import TrainingResult

MAX_PASS_TOKENS = 1024
"""Text tokens of one pass, of all its jobs together; 0 gives every job passes of its own."""


@dataclass(slots=True)
class _Running:
    job_id: str
    shares: Shares[TrainingResult]
    waiting: Share


Outcome = TrainingResult | Exception


class Trainer:
    """Owns the running jobs. Not thread-safe: whoever runs passes also adds and removes jobs, between passes."""

    def __init__(self, model: FrozenModel, *, max_pass_tokens: int = MAX_PASS_TOKENS) -> None:
        self._model = model
        self._max_pass_tokens = max_pass_tokens
        self._running: deque[_Running] = deque()
        self._finished: dict[str, Outcome] = {}

    @property
    def has_work(self) -> bool:
        """Whether `run_pass` has anything to do."""
        return bool(self._running)

    def add(self, job_id: str, job: TrainingJob, watcher: Watcher | None = None) -> None:
        """Take in a job; its first share is made ready at once."""
        self._go_on(job_id, job.shares(watcher))

    def remove(self, job_id: str) -> None:
        """Drop a job without an outcome; unknown ids are fine."""
        self._running = deque(running for running in self._running if running.job_id != job_id)
        self._finished.pop(job_id, None)

    def run_pass(self, between_layers: BetweenLayers | None = None) -> dict[str, Outcome]:
        """Run one pass of as many jobs as fit, none where there is none; return the outcomes of those that have ended.

        A job whose share cannot run, or that stops itself with an error, ends with that error; the others go on.
        """
        chosen = self._choose()
        failed = run_what_fits(self._model, [running.waiting for running in chosen], between_layers)
        for index, running in enumerate(chosen):
            if index in failed:
                self._finished[running.job_id] = failed[index]
            else:
                self._go_on(running.job_id, running.shares)
            if between_layers is not None:  # an optimizer step, too, takes as long as a layer
                between_layers()
        finished, self._finished = self._finished, {}
        return finished

    def _choose(self) -> list[_Running]:
        """Take jobs from the front of the line while their shares fit; they go to its end afterwards."""
        chosen: list[_Running] = []
        room = self._max_pass_tokens
        while self._running and (not chosen or self._running[0].waiting.num_tokens <= room):
            chosen.append(self._running.popleft())
            room -= chosen[-1].waiting.num_tokens
        return chosen

    def _go_on(self, job_id: str, shares: Shares[TrainingResult]) -> None:
        try:
            self._running.append(_Running(job_id, shares, next(shares)))
        except StopIteration as end:
            self._finished[job_id] = end.value
        except Exception as error:  # noqa: BLE001 - one job's fault is that job's outcome
            self._finished[job_id] = error


def train(
    model: FrozenModel, jobs: Mapping[str, TrainingJob], watchers: Mapping[str, Watcher] | None = None
) -> dict[str, TrainingResult]:
    """Run jobs to their ends; raises the first error that a job ends with."""
    trainer = Trainer(model)
    for job_id, job in jobs.items():
        trainer.add(job_id, job, (watchers or {}).get(job_id))
    results: dict[str, TrainingResult] = {}
    while len(results) < len(jobs):
        for job_id, outcome in trainer.run_pass().items():
            if isinstance(outcome, Exception):
                raise outcome
            results[job_id] = outcome
    return results

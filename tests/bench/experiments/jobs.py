"""Many of promptd's own trainings in shared passes, watched: their curves, their tokens, their part of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from promptd.modeling import FrozenModel
from promptd.training import (
    Example,
    Progress,
    TaskFormat,
    Trainer,
    TrainingConfig,
    TrainingJob,
    TrainingResult,
    Watcher,
)
from promptd.training.objectives import Tally
from promptd.training.passes import Shares
from tests.bench.experiments.descent import CurvePoint, objective_loss

MEASURED_SHARE = 1 / 3
"""Cost of a token that is only measured, in tokens that learn: there is no backward pass."""


@dataclass
class Account:
    """What one job did and cost."""

    curve: list[CurvePoint] = field(default_factory=list)
    train_tokens: int = 0
    cpu_seconds: float = 0.0
    """Of the passes that learned, by this job's part of their tokens."""
    due: list[tuple[int, bool]] = field(default_factory=list)
    """(tokens, whether they learned) of the pass that has just run."""


class WatchedJob(TrainingJob):
    """A job that keeps an account."""

    account: Account

    def __init__(
        self,
        model: FrozenModel,
        config: TrainingConfig,
        task: TaskFormat,
        train: Sequence[Example],
        validation: Sequence[Example],
        *,
        selects_on_all: bool = False,
    ) -> None:
        """With `selects_on_all` no validation row is kept for the job's own report: held-out rows report."""
        super().__init__(model, config, task, train, validation)
        if selects_on_all:
            rows = [*self.selection_rows, *self.report_rows]
            self.selection_rows, self.report_rows = rows, rows[:1]

    def shares(self, watcher: Watcher | None = None) -> Shares[TrainingResult]:
        """Yield the job's shares and note what becomes of them."""
        self.account = Account()
        measured: list[Tally] = []

        def stepped(progress: Progress) -> None:
            if progress.scores is not None:
                scores = progress.scores
                self.account.curve.append((progress.step, objective_loss(measured), scores.loss, scores.accuracy))
            measured.clear()

        inner = super().shares(Watcher(stepped))
        while True:
            try:
                share = next(inner)
            except StopIteration as end:
                result: TrainingResult = end.value
                return result
            yield share
            self.account.due.append((share.num_tokens, share.learns))
            if share.learns:
                self.account.train_tokens += share.num_tokens
            else:
                measured.append(share.result)


def run_jobs(
    model: FrozenModel,
    jobs: Mapping[str, WatchedJob],
    on_end: Callable[[str, TrainingResult | Exception, Account], None],
) -> None:
    """Run all jobs; report each one when it ends. A pass's CPU time is shared out by the tokens of its jobs."""
    trainer = Trainer(model)
    for name, job in jobs.items():
        trainer.add(name, job)
    while trainer.has_work:
        began = time.process_time()
        outcomes = trainer.run_pass()
        seconds = time.process_time() - began
        moved = [job.account for job in jobs.values() if job.account.due]
        cost = sum(tokens * (1.0 if learned else MEASURED_SHARE) for own in moved for tokens, learned in own.due)
        for account in moved:
            learned = sum(tokens for tokens, is_learning in account.due if is_learning)
            account.cpu_seconds += seconds * learned / cost
            account.due.clear()
        for name, outcome in outcomes.items():
            on_end(name, outcome, jobs[name].account)

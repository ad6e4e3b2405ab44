"""The training loop of learners that promptd does not have: as `TrainingJob`'s, for anything that yields tallies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch

from promptd.training import Encoded, Objective, Scores, TrainingConfig
from promptd.training.encoding import evaluation_batches, training_batches
from promptd.training.objectives import Tally

MAX_BATCH_TOKENS = 2048

CurvePoint = tuple[int, float, float, float | None]
"""(step, loss that is trained for, nats per target token, accuracy) on the selection rows."""
Best = TypeVar("Best")


@dataclass(frozen=True)
class Descent(Generic[Best]):
    """What a training reached."""

    best: Best
    best_step: int
    curve: list[CurvePoint]
    train_tokens: int
    cpu_seconds: float
    """Of the optimizer's steps, without measuring."""


def descend(
    training: TrainingConfig,
    objective: Objective,
    groups: list[dict[str, Any]],
    train: Sequence[Encoded],
    selection: Sequence[Encoded],
    tally: Callable[[Sequence[Encoded]], Tally],
    keep: Callable[[], Best],
) -> Descent[Best]:
    """Take a job's steps over its batches; return what `keep` gave at the step that is best on the selection rows.

    `tally` measures rows with autograd to the parameters of `groups`.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    curve: list[CurvePoint] = []
    best: tuple[Scores, int, Best] | None = None
    seconds, num_tokens, num_evaluations, num_stale = 0.0, 0, 0, 0
    batches = islice(training_batches(train, training.batch_size, training.seed), training.num_steps)
    for step, batch in enumerate(batches, start=1):
        began = time.process_time()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * training.rate_scale(training.share_done(step - 1, 0.0))
        optimizer.zero_grad(set_to_none=True)
        (tally(batch).loss / objective.num_terms(batch)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        seconds += time.process_time() - began
        num_tokens += sum(objective.num_tokens(row) for row in batch)
        due = int(training.share_done(step, 0.0) * training.num_evaluations)
        if num_evaluations < due:
            num_evaluations = due
            tallies = measure(objective, selection, tally)
            scores = Scores.of(tallies, has_labels=objective.has_labels)
            curve.append((step, objective_loss(tallies), scores.loss, scores.accuracy))
            num_stale += 1
            if best is None or scores.rank > best[0].rank:
                best, num_stale = (scores, step, keep()), 0
            if training.patience is not None and num_stale >= training.patience:
                break
    if best is None:
        raise ValueError(f"no evaluation in {training.num_steps} steps")
    return Descent(best[2], best[1], curve, num_tokens, seconds)


@torch.no_grad()
def measure(objective: Objective, rows: Sequence[Encoded], tally: Callable[[Sequence[Encoded]], Tally]) -> list[Tally]:
    """Measure rows in batches."""
    batches = evaluation_batches([objective.num_tokens(row) for row in rows], MAX_BATCH_TOKENS)
    return [tally([rows[index] for index in batch]) for batch in batches]


def objective_loss(tallies: Sequence[Tally]) -> float:
    """Return the mean of what training minimizes."""
    return sum(tally.loss.item() for tally in tallies) / sum(tally.num_terms for tally in tallies)

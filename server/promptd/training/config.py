"""Settings of a training job that are not its method's own."""

from __future__ import annotations

from dataclasses import dataclass, field

from promptd.training.checks import Count, Natural, NonNegative, Positive, Share, check_fields
from promptd.training.methods import MethodConfig, ResidualConfig
from promptd.training.optimizers import OptimizerName
from promptd.training.schedules import ScheduleName, rate_scale


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """One job's settings beside its method's. Checked on creation: `InvalidRequestError` names field and value."""

    method: MethodConfig = field(default_factory=ResidualConfig)
    optimizer: OptimizerName = "adamw"
    weight_decay: NonNegative = 1e-5
    num_steps: Count = 300
    batch_size: Count = 32
    warmup_ratio: Share = 0.05
    schedule: ScheduleName = "linear"
    max_grad_norm: Positive = 1.0
    num_evaluations: Count = 10
    patience: Count | None = None
    """End after so many evaluations in a row that are not the best so far."""
    max_seconds: Positive | None = None
    """End by then at the latest, the schedule compressed to fit; the result then depends on the machine's speed."""
    seed: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def rate_scale(self, done: float) -> float:
        """Share of the full rate when `done` of the training (0 to 1) lies behind; never 0."""
        return max(rate_scale(self.schedule, done, self.warmup_ratio), 1 / self.num_steps)

    def share_done(self, step: int, seconds: float) -> float:
        """Return how much of the training lies behind after `step` steps and `seconds`, 0 to 1."""
        spent = 0.0 if self.max_seconds is None else seconds / self.max_seconds
        return min(1.0, max(step / self.num_steps, spent))

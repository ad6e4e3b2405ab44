"""Train one prompt on a frozen model: the loop, its settings, and the best prompt it saw.

Prompts and optimizer state are float32, the model is frozen and in eval mode. Which step is best is decided on the
folded prompt with one half of the validation rows; the other half only reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from promptd.errors import InvalidRequestError, NumericalError
from promptd.modeling import FrozenModel
from promptd.training.checks import Count, Natural, NonNegative, Positive, Share, check_fields
from promptd.training.data import Example, data_digest, shuffled
from promptd.training.encoding import Encoded, TaskFormat, encode_examples, label_word_ids, training_batches
from promptd.training.evaluation import Scores, evaluate, majority_share
from promptd.training.losses import training_loss
from promptd.training.methods import MethodConfig, ResidualConfig, build_method
from promptd.training.optimizers import OptimizerName, build_optimizer
from promptd.training.schedules import ScheduleName, rate_scale
from promptd.training.sidecar import method_from_sidecar, sidecar_bytes


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


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did; `scores` on the selection half where the step ended with an evaluation."""

    step: int
    num_steps: int
    loss: float
    num_tokens: int
    seconds: float
    scores: Scores | None = None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The best folded prompt and everything that is recorded about it."""

    prompt: torch.Tensor
    """Folded, float32: `[n, hidden_size]` or `[num_layers, 2, num_kv_heads, n, head_dim]`."""
    sidecar: bytes
    """The parameters before folding, as safetensors: training can resume from them."""
    config: TrainingConfig
    best_step: int
    selection: Scores
    """On the half of the validation rows that chose the step."""
    report: Scores
    """On the other half, which chose nothing."""
    bare: Scores
    """The bare model on the report half, same template."""
    majority: tuple[str, float] | None
    """The report half's most frequent label and its share; None for completions."""
    trainable_params: int
    stored_params: int
    data_digest: str
    seconds: float
    history: tuple[Progress, ...]


class PromptTrainer:
    """Trains one prompt. The model is read-only; the only state is the method's parameters."""

    def __init__(
        self,
        model: FrozenModel,
        config: TrainingConfig,
        task: TaskFormat,
        train: Sequence[Example],
        validation: Sequence[Example],
        *,
        resume_from: bytes | None = None,
    ) -> None:
        if len(validation) < 2:
            raise InvalidRequestError(f"needs at least 2 validation rows, got {len(validation)}", param="validation")
        self.model = model
        self.config = config
        self.words = label_word_ids(model, task)
        self.data_digest = data_digest([*train, *validation])
        count = config.method.num_virtual_tokens
        self.train_rows = encode_examples(model, task, train, count)
        held_out = encode_examples(model, task, shuffled(validation, config.seed), count)
        self.selection_rows, self.report_rows = held_out[::2], held_out[1::2]
        if resume_from is None:
            self.method = build_method(config.method, model, seed=config.seed, label_words=task.label_words)
        else:
            self.method = method_from_sidecar(resume_from, config.method, model)

    def run(self, on_progress: Callable[[Progress], None] | None = None) -> TrainingResult:
        """Train to the end and return the prompt that was best on the selection half; callbacks may raise to stop."""
        began = time.monotonic()
        config = self.config
        optimizer = build_optimizer(config.optimizer, self.method.parameter_groups(), config.weight_decay)
        full_rates = [group["lr"] for group in optimizer.param_groups]
        batches = training_batches(self.train_rows, config.batch_size, config.seed)
        best: _Best | None = None
        history: list[Progress] = []
        step, evaluations, done = 0, 0, 0.0
        while done < 1:
            for group, rate in zip(optimizer.param_groups, full_rates, strict=True):
                group["lr"] = rate * config.rate_scale(done)
            batch = next(batches)
            loss = self._step(optimizer, batch, step)
            step += 1
            done = config.share_done(step, time.monotonic() - began)
            scores = None
            if int(done * config.num_evaluations) > evaluations:
                evaluations = int(done * config.num_evaluations)
                best, scores = self._evaluated(best, step)
            num_tokens = sum(row.num_tokens for row in batch)
            history.append(Progress(step, config.num_steps, loss, num_tokens, time.monotonic() - began, scores))
            if on_progress is not None:
                on_progress(history[-1])
        return self._result(best or self._evaluated(None, step)[0], history, began)

    def _step(self, optimizer: torch.optim.Optimizer, batch: list[Encoded], step: int) -> float:
        self.method.train()
        loss = training_loss(self.model, self.method.materialize(), batch, self.words)
        if not loss.isfinite():
            raise NumericalError(f"the training loss is not finite at step {step + 1}; a smaller learning_rate helps")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.method.parameters(), self.config.max_grad_norm)
        optimizer.step()
        return loss.item()

    def _evaluated(self, best: _Best | None, step: int) -> tuple[_Best, Scores]:
        """Score the folded prompt on the selection half and keep it where it is the best so far."""
        folded = self.method.fold()
        scores = evaluate(self.model, folded, self.selection_rows, self.words)
        if best is None or scores.rank > best.scores.rank:
            best = _Best(step, scores, folded, sidecar_bytes(self.method))
        return best, scores

    def _result(self, best: _Best, history: Sequence[Progress], began: float) -> TrainingResult:
        return TrainingResult(
            prompt=best.folded,
            sidecar=best.sidecar,
            config=self.config,
            best_step=best.step,
            selection=best.scores,
            report=evaluate(self.model, best.folded, self.report_rows, self.words),
            bare=evaluate(self.model, None, self.report_rows, self.words),
            majority=majority_share([row.example.label or "" for row in self.report_rows]) if self.words else None,
            trainable_params=self.method.trainable_params,
            stored_params=self.method.stored_params,
            data_digest=self.data_digest,
            seconds=time.monotonic() - began,
            history=tuple(history),
        )


@dataclass(frozen=True, slots=True)
class _Best:
    step: int
    scores: Scores
    folded: torch.Tensor
    sidecar: bytes

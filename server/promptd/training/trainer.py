"""Train one prompt on a frozen model: the loop, its settings, and the best prompt it saw.

Prompts and optimizer state are float32, the model is frozen and in eval mode. Which step is best is decided on the
folded prompt with one half of the validation rows; the other half only reports.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from promptd.errors import InvalidRequestError, NumericalError
from promptd.modeling import FrozenModel
from promptd.training.data import Example, data_digest, shuffled
from promptd.training.encoding import Encoded, TaskFormat, encode_examples, label_word_ids, training_batches
from promptd.training.evaluation import Scores, evaluate, majority_share
from promptd.training.losses import training_loss
from promptd.training.methods import MethodConfig, build_method
from promptd.training.sidecar import method_from_sidecar, sidecar_bytes

SCHEDULES = ("linear", "constant")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """One job's settings. Checked on creation; None means the method's default."""

    method: MethodConfig = field(default_factory=MethodConfig)
    learning_rate: float | None = None
    """In units of the standard deviation of the embedding output (prefixes: of the layers' activations)."""
    network_learning_rate: float | None = None
    """For linear layers of a reparameterization network."""
    weight_decay: float = 1e-5
    num_steps: int = 300
    batch_size: int = 32
    warmup_ratio: float = 0.05
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    num_evaluations: int = 10
    max_seconds: float | None = None
    """End by then at the latest, the schedule compressed to fit; the result then depends on the machine's speed."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("num_steps", "batch_size", "max_grad_norm", "num_evaluations")
        for name in (*positive, "learning_rate", "network_learning_rate", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise InvalidRequestError(f"{name} must be a positive number, got {value!r}", param=name)
        if not 0 <= self.warmup_ratio < 1:
            value = self.warmup_ratio
            raise InvalidRequestError(
                f"warmup_ratio must be at least 0 and below 1, got {value!r}", param="warmup_ratio"
            )
        if self.schedule not in SCHEDULES:
            raise InvalidRequestError(f"schedule must be linear or constant, got {self.schedule!r}", param="schedule")

    @property
    def rates(self) -> tuple[float, float]:
        """(learning_rate, network_learning_rate) with the method's defaults filled in."""
        default, network = DEFAULT_RATES[self.method.name]
        return self.learning_rate or default, self.network_learning_rate or network

    def rate_scale(self, done: float) -> float:
        """Share of the full rate when `done` of the training (0 to 1) lies behind; never 0."""
        rising = done / self.warmup_ratio if done < self.warmup_ratio else 1.0
        falling = 1.0 if self.schedule == "constant" else (1 - done) / (1 - self.warmup_ratio)
        return max(min(rising, falling), 1 / self.num_steps)

    def share_done(self, step: int, seconds: float) -> float:
        """Return how much of the training lies behind after `step` steps and `seconds`, 0 to 1."""
        spent = 0.0 if self.max_seconds is None else seconds / self.max_seconds
        return min(1.0, max(step / self.num_steps, spent))


DEFAULT_RATES = {"residual": (1.0, 3e-4), "prompt_tuning": (0.3, 3e-3), "prefix": (0.1, 3e-3)}
"""Method -> (learning_rate, network_learning_rate)."""


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
        optimizer = torch.optim.AdamW(self.method.parameter_groups(*config.rates), weight_decay=config.weight_decay)
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
            best = _Best(step, scores, folded, sidecar_bytes(self.method, self.config.method))
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

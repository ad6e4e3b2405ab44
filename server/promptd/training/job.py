"""One training job: a prompt's parameters, its optimizer, its place in the data, and the best prompt it has seen.

A job never touches the model. It asks for passes, one `Share` after the other, and whoever runs them may mix the shares
of many jobs; what a job computes depends on its own settings and rows alone. Prompts and optimizer state are float32.
Which step is best is decided on the folded prompt with one half of the validation rows; the other half only reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from promptd.errors import InvalidRequestError, NumericalError
from promptd.modeling import FrozenModel
from promptd.training.checkpoint import Best, Checkpoint, read_checkpoint, write_checkpoint
from promptd.training.config import TrainingConfig
from promptd.training.context import FrozenContext
from promptd.training.data import Example, data_digest, shuffled
from promptd.training.distill_objective import DistillObjective
from promptd.training.encoding import (
    MAX_SHARE_KEYS,
    Encoded,
    TaskFormat,
    encode_examples,
    evaluation_batches,
    training_batches,
)
from promptd.training.methods import METHODS, PromptMethod, build_method
from promptd.training.objectives import objective_for
from promptd.training.optimizers import build_optimizer
from promptd.training.passes import MAX_SHARE_TOKENS, Share, Shares
from promptd.training.result import TrainingResult
from promptd.training.scores import Scores, majority_share
from promptd.training.sidecar import method_from_sidecar, sidecar_bytes
from promptd.training.teacher import Teacher

CHECKPOINT_SECONDS = 10.0
"""Training that may be lost where its process dies."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did; `scores` on the selection half where the step ended with an evaluation."""

    step: int
    num_steps: int
    loss: float
    num_tokens: int
    seconds: float
    """Of this step, without the evaluation behind it; passes are shared with other jobs."""
    scores: Scores | None = None


@dataclass(slots=True)
class Watcher:
    """What a job tells while it runs; called between two of its shares, so it must be quick. It may raise to stop."""

    on_progress: Callable[[Progress], None] = lambda progress: None
    on_checkpoint: Callable[[bytes], None] | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS


class TrainingJob:
    """Trains one prompt. `shares` is the whole of it; between two steps it can be written down and gone on with."""

    def __init__(
        self,
        model: FrozenModel,
        config: TrainingConfig,
        task: TaskFormat,
        train: Sequence[Example],
        validation: Sequence[Example],
        *,
        warm_start: torch.Tensor | None = None,
        resume_from: bytes | None = None,
        replaces: FrozenContext | None = None,
        behind: FrozenContext | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """Encode the rows and build the parameters.

        `warm_start` is a stored prompt to begin with, `resume_from` a sidecar to go on from, `replaces` what is
        in service now, with all that it stands behind, `behind` a chain of stored prompts that stays as it is: only
        what is served as its next element is learned. What a `teacher` would say replaces the rows' own targets. Raises
        `InvalidRequestError` and `TrainingDataError`.
        """
        if len(validation) < 2:
            raise InvalidRequestError(f"needs at least 2 validation rows, got {len(validation)}", param="validation")
        self.config = config
        kind = METHODS[config.method.name].kind
        self.objective = objective_for(model, task, kind) if teacher is None else DistillObjective()
        self.objective.num_target_tokens = config.method.num_target_tokens
        self.data_digest = data_digest([*train, *validation])
        self._behind, self._teacher = behind, teacher
        self._num_before = config.method.num_before + (0 if behind is None else behind.num_tokens)
        self._train_rows = encode_examples(model, task, train, self._num_before)
        held_out = encode_examples(model, task, shuffled(validation, config.seed), self._num_before)
        if teacher is not None:
            self.data_digest = teacher.digest(self.data_digest)
            rows = teacher.checked([*self._train_rows, *held_out], self._num_before)
            self._train_rows, held_out = rows[: len(train)], rows[len(train) :]
        self.selection_rows, self.report_rows = held_out[::2], held_out[1::2]
        self._model = model
        longest = max(row.length(self._max_written) for row in self.report_rows)
        if replaces is not None and replaces.num_tokens + longest > model.spec.max_model_len:
            replaces = None  # it cannot be asked what the new one can
        self._replaces = replaces
        self.method: PromptMethod
        if resume_from is not None:
            self.method = method_from_sidecar(resume_from, config.method, model)
        else:
            words = task.label_words
            self.method = build_method(
                config.method,
                model,
                seed=config.seed,
                label_words=words,
                warm_start=warm_start,
                behind=behind,
                num_classes=self.objective.num_classes,
            )
        self._optimizer = build_optimizer(config.optimizer, self.method.parameter_groups(), config.weight_decay)
        self._full_rates = [group["lr"] for group in self._optimizer.param_groups]
        self._step, self._num_evaluations, self._num_stale = 0, 0, 0
        self._best: Best | None = None
        self._seconds = 0.0

    def shares(self, watcher: Watcher | None = None) -> Shares[TrainingResult]:
        """Yield the parts of the job's passes; each needs its tally before the next is asked for.

        The iterator's return value is the `TrainingResult`. Raises `NumericalError` where the loss is not finite.
        """
        watcher = watcher or Watcher()
        if self._teacher is not None:
            self._rows = yield from self._teacher.complete(self._rows)
        began = saved = time.monotonic()
        before = self._seconds
        batches = islice(training_batches(self._train_rows, self.config.batch_size, self.config.seed), self._step, None)
        while not self._is_done:
            done = self.config.share_done(self._step, self._seconds)
            batch, step_began = next(batches), time.monotonic()
            loss = yield from self._learn(batch, self.config.rate_scale(done))
            self._step += 1
            now = time.monotonic()
            self._seconds = before + now - began
            scores = None
            if self._num_evaluations < int(self._share_done * self.config.num_evaluations):
                scores = (yield from self._select()).scores
            num_tokens = sum(row.num_tokens for row in batch)
            watcher.on_progress(Progress(self._step, self.config.num_steps, loss, num_tokens, now - step_began, scores))
            if watcher.on_checkpoint is not None and now - saved > watcher.checkpoint_seconds:
                saved = now
                watcher.on_checkpoint(self.checkpoint())
        return (yield from self._result())

    @property
    def step(self) -> int:
        """How many steps lie behind."""
        return self._step

    @property
    def _rows(self) -> list[Encoded]:
        """All rows: what trains, what selects, what reports."""
        return [*self._train_rows, *self.selection_rows, *self.report_rows]

    @_rows.setter
    def _rows(self, rows: Sequence[Encoded]) -> None:
        given = iter(rows)
        for part in (self._train_rows, self.selection_rows, self.report_rows):
            part[:] = islice(given, len(part))

    @property
    def _max_written(self) -> int:
        return 0 if self._teacher is None else self._teacher.max_written

    @property
    def _share_done(self) -> float:
        return self.config.share_done(self._step, self._seconds)

    @property
    def _is_done(self) -> bool:
        patience = self.config.patience
        return self._share_done >= 1 or (patience is not None and self._num_stale >= patience)

    def _learn(self, batch: list[Encoded], rate_scale: float) -> Shares[float]:
        """Take one optimizer step over a batch; return its loss."""
        self.method.train()
        prompt = self.method.materialize()
        leaf = prompt.detach().requires_grad_()
        num_terms, loss = self.objective.num_terms(batch), 0.0
        for rows in self._parts(batch):
            share = Share(self.objective, rows, leaf, 1 / num_terms, self._behind)
            yield share
            loss += share.result.loss.item() / num_terms
        if not (loss - loss == 0 and leaf.grad is not None and leaf.grad.isfinite().all()):
            raise NumericalError(
                f"the training loss is not finite at step {self._step + 1}; a smaller learning_rate helps"
            )
        self._optimizer.zero_grad(set_to_none=True)
        prompt.backward(leaf.grad)  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.method.parameters(), self.config.max_grad_norm)
        for group, rate in zip(self._optimizer.param_groups, self._full_rates, strict=True):
            group["lr"] = rate * rate_scale
        self._optimizer.step()
        return loss

    def _parts(self, batch: Sequence[Encoded]) -> Iterator[list[Encoded]]:
        """Cut a batch, in its order, into parts that one share may have (but at least one row)."""
        part: list[Encoded] = []
        num_tokens = longest = 0
        for row in batch:
            needed = self.objective.num_tokens(row)
            num_keys = (len(part) + 1) * (self._num_before + max(longest, needed))
            if part and (num_tokens + needed > MAX_SHARE_TOKENS or num_keys > MAX_SHARE_KEYS):
                yield part
                part, num_tokens, longest = [], 0, 0
            part.append(row)
            num_tokens, longest = num_tokens + needed, max(longest, needed)
        yield part

    def _select(self) -> Shares[Best]:
        """Score the folded prompt on the selection half and keep it where it is the best so far."""
        self._num_evaluations = int(self._share_done * self.config.num_evaluations)
        folded = self.method.fold()
        scores = yield from self._scores(folded, self.selection_rows, self._behind)
        newest = Best(self._step, scores, folded, sidecar_bytes(self.method))
        self._num_stale += 1
        if self._best is None or scores.rank > self._best.scores.rank:
            self._best, self._num_stale = newest, 0
        return newest

    def _scores(
        self, prompt: torch.Tensor | None, rows: Sequence[Encoded], context: FrozenContext | None
    ) -> Shares[Scores]:
        """Measure a prompt behind a context on rows; return its `Scores`."""
        tallies = []
        num_before = 0 if prompt is None else self.config.method.num_before
        num_before += 0 if context is None else context.num_tokens
        lengths = [self.objective.num_tokens(row) for row in rows]
        for batch in evaluation_batches(lengths, MAX_SHARE_TOKENS, num_before):
            share = Share(self.objective, [rows[index] for index in batch], prompt, context=context)
            yield share
            tallies.append(share.result)
        return Scores.of(tallies, has_labels=self.objective.has_labels)

    def _result(self) -> Shares[TrainingResult]:
        best = self._best or (yield from self._select())
        report = yield from self._scores(best.folded, self.report_rows, self._behind)
        bare = yield from self._scores(None, self.report_rows, self._behind)
        before = bare
        if self._replaces is not None:
            before = yield from self._scores(None, self.report_rows, self._replaces)
        labels = [row.example.label or "" for row in self.report_rows]
        return TrainingResult(
            prompt=best.folded,
            sidecar=best.sidecar,
            config=self.config,
            best_step=best.step,
            num_steps=self._step,
            selection=best.scores,
            report=report,
            before=before,
            bare=bare,
            majority=majority_share(labels) if self.objective.has_labels else None,
            distilled=None if self._teacher is None else self._teacher.facts,
            trainable_params=self.method.trainable_params,
            stored_params=self.method.stored_params,
            data_digest=self.data_digest,
            seconds=self._seconds,
        )

    def checkpoint(self) -> bytes:
        """Return what a new job of the same settings and rows needs to go on bit for bit; between two steps."""
        return write_checkpoint(
            Checkpoint(
                step=self._step,
                num_evaluations=self._num_evaluations,
                num_stale=self._num_stale,
                seconds=self._seconds,
                data_digest=self.data_digest,
                sidecar=sidecar_bytes(self.method),
                optimizer=self._optimizer.state_dict()["state"],
                best=self._best,
                targets=None if self._teacher is None else [row.target_ids for row in self._rows],
            )
        )

    def restore(self, content: bytes) -> None:
        """Go on from a checkpoint. Raises `InvalidRequestError` where it is of other rows or settings."""
        saved = read_checkpoint(content)
        if saved.data_digest != self.data_digest:
            raise InvalidRequestError(
                f"the checkpoint is of other rows: {saved.data_digest}, not {self.data_digest}", param="checkpoint"
            )
        live = method_from_sidecar(saved.sidecar, self.config.method, self._model)
        self.method.load_state_dict(live.state_dict())
        self.method.set_rng_state(live.rng_state())
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": saved.optimizer, "param_groups": groups})
        self._step, self._num_evaluations = saved.step, saved.num_evaluations
        self._num_stale, self._seconds, self._best = saved.num_stale, saved.seconds, saved.best
        if saved.targets is not None:
            rows = zip(self._rows, saved.targets, strict=True)
            self._rows = [replace(row, target_ids=target_ids) for row, target_ids in rows]

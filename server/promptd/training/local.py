"""Training without a server: files of rows become a folder of prompts, and what was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from promptd_store import PromptArtifact

from promptd.errors import InvalidRequestError
from promptd.jobs import JobData, JobError, JobProgress, JobSpec
from promptd.modeling import FrozenModel
from promptd.training.artifact import make_artifact, provenance
from promptd.training.encoding import TaskFormat
from promptd.training.folder import PromptFolder
from promptd.training.job import CHECKPOINT_SECONDS, Progress, TrainingJob, Watcher
from promptd.training.pace import Pace
from promptd.training.plan import JobPrompts, make_job
from promptd.training.reasons import reason_of
from promptd.training.result import TrainingResult
from promptd.training.trainer import MAX_PASS_TOKENS, Outcome, Trainer
from promptd.training.worker import MAX_JOBS


@dataclass(frozen=True, slots=True)
class LocalJob:
    """One prompt to train: its name, settings and rows."""

    name: str
    spec: JobSpec
    data: JobData
    start: PromptArtifact | None = None
    """The prompt to begin with."""

    def digest(self, model: FrozenModel) -> str:
        """Tell this job on this model from all others: equal digests come to equal prompts."""
        parts = [self.data.training, self.data.validation or b"", json.dumps(asdict(self.spec)).encode()]
        parts += [model.spec.fingerprint.encode(), b"" if self.start is None else self.start.version.encode()]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(hashlib.sha256(part).digest())
        return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True, slots=True)
class LocalEnd:
    """What became of one job."""

    name: str
    state: Literal["trained", "unchanged", "stopped", "failed"]
    """`unchanged`: the folder has this prompt already, of the same rows and settings."""
    card: dict[str, Any] | None = None
    error: JobError | None = None


class LocalTraining:
    """Runs jobs on one model in the caller's thread, as many at once as share the model well."""

    def __init__(
        self,
        model: FrozenModel,
        folder: PromptFolder,
        *,
        strict: bool = False,
        overwrite: bool = False,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        on_start: Callable[[str, int], None] = lambda name, step: None,
        on_progress: Callable[[str, JobProgress, Progress], None] = lambda name, told, progress: None,
        on_end: Callable[[LocalEnd], None] = lambda end: None,
    ) -> None:
        """`strict` gives every job passes of its own; `overwrite` replaces prompts of other rows or settings.

        `on_start` is told after which step a job goes on, `on_progress` every step, as people hear it and as it is.
        """
        self._model = model
        self._folder = folder
        self._overwrite = overwrite
        self._checkpoint_seconds = checkpoint_seconds
        self._on_start = on_start
        self._on_progress = on_progress
        self._on_end = on_end
        self._trainer = Trainer(model, max_pass_tokens=0 if strict else MAX_PASS_TOKENS)
        self._running: dict[str, _Running] = {}
        self._is_stopping = False

    def stop(self) -> None:
        """Save every running job after its next step and begin no other; from any thread or signal handler."""
        self._is_stopping = True

    def run(self, jobs: Iterable[LocalJob]) -> None:
        """Run all jobs to their ends; one that fails takes no other along."""
        waiting = deque(jobs)
        while waiting or self._running:
            while waiting and (self._is_stopping or len(self._running) < MAX_JOBS):
                self._start(waiting.popleft())
            if self._is_stopping:
                for running in self._running.values():
                    running.watcher.checkpoint_seconds = -1.0
            for name, outcome in self._trainer.run_pass().items():
                self._end(self._running.pop(name), outcome)

    def _start(self, job: LocalJob) -> None:
        if self._is_stopping:
            self._on_end(LocalEnd(job.name, "stopped"))
            return
        digest = job.digest(self._model)
        card = self._folder.card(job.name)
        has_prompt = self._folder.prompt_path(job.name).exists()
        if has_prompt and card is not None and card.get("request_digest") == digest:
            self._on_end(LocalEnd(job.name, "unchanged", card))
            return
        if has_prompt and not self._overwrite:
            message = f"{self._folder.prompt_path(job.name)} is there, of other rows or settings"
            self._on_end(LocalEnd(job.name, "failed", error=JobError("prompt_exists", message)))
            return
        try:
            start = None if job.start is None else job.start.learned
            training, task = make_job(self._model, job.spec, job.data, JobPrompts(start))
            self._restore(training, job.name, digest)
        except Exception as error:  # noqa: BLE001 - one job's fault is that job's end
            self._on_end(LocalEnd(job.name, "failed", error=reason_of(error)))
            return
        watcher = Watcher(checkpoint_seconds=self._checkpoint_seconds)
        running = self._running[job.name] = _Running(job.name, digest, training, task, watcher, Pace())
        watcher.on_progress = partial(self._progressed, running)
        watcher.on_checkpoint = partial(self._save, running)
        self._on_start(job.name, training.step)
        self._trainer.add(job.name, training, watcher)

    def _restore(self, training: TrainingJob, name: str, digest: str) -> None:
        checkpoint = self._folder.checkpoint(name, digest)
        if checkpoint is not None:
            try:
                training.restore(checkpoint)
            except InvalidRequestError as error:
                path = self._folder.checkpoint_path(name)
                raise InvalidRequestError(
                    f"{path}: {error.message}; without this file the job begins anew", param="checkpoint"
                ) from None

    def _progressed(self, running: _Running, progress: Progress) -> None:
        running.pace.add(progress)
        self._on_progress(running.name, running.pace.told(), progress)

    def _save(self, running: _Running, checkpoint: bytes) -> None:
        self._folder.save_checkpoint(running.name, running.digest, checkpoint)
        if self._is_stopping:
            raise _StoppedError

    def _end(self, running: _Running, outcome: Outcome) -> None:
        if isinstance(outcome, TrainingResult):
            artifact = make_artifact(self._model, running.task, outcome)
            card = {
                "name": running.name,
                "request_digest": running.digest,
                "version": artifact.version,
                "base_fingerprint": self._model.spec.fingerprint,
                "kind": str(artifact.kind),
                "num_virtual_tokens": artifact.num_virtual_tokens,
                "template": running.task.template,
                "label_words": running.task.label_words,
                "provenance": provenance(outcome),
            }
            self._folder.save(running.name, artifact, outcome.sidecar, card)
            self._on_end(LocalEnd(running.name, "trained", card))
        elif isinstance(outcome, _StoppedError):
            self._on_end(LocalEnd(running.name, "stopped"))
        else:
            self._on_end(LocalEnd(running.name, "failed", error=reason_of(outcome)))


@dataclass(slots=True)
class _Running:
    name: str
    digest: str
    training: TrainingJob
    task: TaskFormat
    watcher: Watcher
    pace: Pace


class _StoppedError(Exception):
    """A job has been saved and is to go on another time."""

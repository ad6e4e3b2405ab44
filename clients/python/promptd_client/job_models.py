"""What the server answers about training files and jobs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from promptd_client.models import Reply


class File(Reply):
    """An uploaded training file."""

    id: str
    filename: str
    bytes: int
    created_at: int
    """Seconds since 1970, as all times here."""


class FilePage(Reply):
    """Part of a list of files."""

    data: list[File]
    has_more: bool = False


class JobProgress(Reply):
    """How far training is. Losses are nats per target token."""

    step: int
    num_steps: int
    num_tokens: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None


class JobResult(Reply):
    """What a job has published, and how it scores on rows that were held out, before and after."""

    prompt: str
    version: str
    number: int
    best_step: int
    seed: int
    data_digest: str
    scores_before: dict[str, Any]
    scores_after: dict[str, Any]


class JobFailure(Reply):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class Job(Reply):
    """A training job."""

    id: str
    status: str
    """queued, running, paused, cancelled, succeeded or failed."""
    prompt: str
    """What the prompt is or will be called."""
    fine_tuned_model: str | None = None
    """The same, once it can be asked."""
    model: str
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    method: dict[str, Any] = Field(default_factory=dict)
    training_file: str | None = None
    validation_file: str | None = None
    base_prompt: str | None = None
    behind: list[str] = Field(default_factory=list)
    distill: dict[str, Any] | None = None
    template: str | None = None
    label_words: dict[str, str] | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    progress: JobProgress | None = None
    result: JobResult | None = None
    error: JobFailure | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.status in ("succeeded", "failed", "cancelled")


class JobPage(Reply):
    """Part of a list of jobs."""

    data: list[Job]
    has_more: bool = False


class JobEvent(Reply):
    """One entry of a job's log."""

    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] = Field(default_factory=dict)

    @property
    def progress(self) -> JobProgress | None:
        """How far training was; None for a plain message."""
        return JobProgress.model_validate(self.data) if self.type == "metrics" else None

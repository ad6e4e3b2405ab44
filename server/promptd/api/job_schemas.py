"""Bodies of the routes that start training."""

from __future__ import annotations

from typing import Annotated, Any

from promptd_store import MAX_CHAIN_PROMPTS
from pydantic import Field

from promptd.api.schemas import MAX_LABELS, FieldName, Label, Metadata, PromptName, Row, Strict, Text, User
from promptd.jobs.record import MAX_PRIORITY

MAX_BULK_JOBS = 1000
MAX_ROWS = 50_000

FileId = Annotated[str, Field(min_length=1, max_length=64)]
Rows = Annotated[list[Row], Field(min_length=1, max_length=MAX_ROWS, fail_fast=True)]


class JobFields(Strict):
    """What all ways of starting a job share."""

    training_file: FileId | None = None
    rows: Rows | None = None
    """The training file's rows, in its place."""
    validation_file: FileId | None = None
    method: Annotated[dict[FieldName, Any], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    base_prompt: PromptName | None = None
    """The prompt to start from."""
    behind: Annotated[list[PromptName], Field(max_length=MAX_CHAIN_PROMPTS - 1)] | None = None
    """Prompts that the new one is trained and then always served behind, from the chain's beginning; omitted: those
    that `base_prompt` stands behind."""
    distill: Annotated[dict[FieldName, Any], Field(max_length=64)] | None = None
    """Learn what the model says behind a text or a stored prompt, in the place of rows with answers."""
    template: Text | None = None
    label_words: Annotated[dict[Label, Text], Field(min_length=2, max_length=MAX_LABELS)] | None = None
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] | None = None
    publish_worse: bool | None = None
    """Publish the prompt even where it scores below the one that it replaces, or below the bare model."""
    metadata: Metadata | None = None
    user: User | None = None
    """The end user whom the job and its prompt belong to; omitted: whom the training file belongs to."""


class JobBody(JobFields):
    """`POST /v1/fine_tuning/jobs`; `model` is the base model (also where none is named), or a prompt to start from."""

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    suffix: PromptName | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None


class BulkJob(JobFields):
    """One job of many."""

    name: PromptName | None = None


class BulkBody(Strict):
    """`POST /admin/training/jobs`: a job's own field counts before the default."""

    defaults: JobFields = JobFields()
    jobs: Annotated[list[BulkJob], Field(min_length=1, max_length=MAX_BULK_JOBS)]

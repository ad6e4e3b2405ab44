"""The fields of a training job. All are optional, but rows must come from somewhere; the server checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class JobFields(TypedDict, total=False):
    """What every way of starting a job takes."""

    training_file: str
    """Id of an uploaded file: lines of `{"prompt","completion"}`, `{"text","label"}` or `{"messages"}`."""
    rows: Sequence[Mapping[str, Any]]
    """The rows themselves, in place of a file."""
    validation_file: str
    method: Mapping[str, Any]
    """`{"type": "residual", "residual": {"hyperparameters": {"num_steps": 300}}}`"""
    seed: int
    base_prompt: str
    """A prompt to start from."""
    behind: Sequence[str]
    """Prompts that the new one is trained and always served behind, from the chain's beginning."""
    distill: Mapping[str, Any]
    """`{"text": "…"}` or `{"prompt": "<stored prompt>"}`: learn what the model says with that in its context. Rows are
    then questions, and without any the model writes them itself."""
    template: str
    label_words: Mapping[str, str]
    """Label -> the text that stands for it; omitted: the labels themselves."""
    priority: int
    publish_worse: bool
    metadata: Mapping[str, str]
    user: str
    """The end user whom the job and its prompt belong to: `client.erase_user` erases them."""
    extra_body: Mapping[str, Any]
    """Fields that this client does not know yet."""


class JobOptions(JobFields, total=False):
    """One job."""

    model: str
    """The base model, or a prompt to start from; omitted: the base model."""
    suffix: str
    """What the prompt shall be called; omitted: `ft-<job id>`."""


class BulkJobOptions(JobFields, total=False):
    """One job of many."""

    name: str
    """What the prompt shall be called; omitted: `ft-<job id>`."""

"""From what a tenant asked for, as plain JSON, to settings that a job can be made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from promptd_store import PromptArtifact, template_fields

from promptd.errors import InvalidRequestError
from promptd.jobs import JobData, JobSpec
from promptd.modeling import FrozenModel
from promptd.training.checks import Share, check_fields, from_json
from promptd.training.config import TrainingConfig
from promptd.training.data import Example, TrainingDataError, parse_examples, split_examples
from promptd.training.encoding import TaskFormat
from promptd.training.job import TrainingJob
from promptd.training.methods import METHODS, method_values

DEFAULT_LABEL_TEMPLATE = "{text}\nLabel:"
VALIDATION_SHARE = 0.2
MIN_STEPS, MAX_STEPS, NUM_EPOCHS = 200, 2000, 20
"""A job that names no number of steps sees its rows this often, but takes at least and at most so many steps."""


@dataclass(frozen=True, slots=True)
class Publication:
    """What happens to a finished prompt."""

    publish_worse: bool = False
    """Publish a prompt that is worse than the one it replaces, or than the bare model."""
    validation_share: Share = VALIDATION_SHARE
    """Part of the rows that is held out where no validation file is given; half of it selects, half reports."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class JobPlan:
    """The checked settings of one job."""

    config: TrainingConfig
    publication: Publication
    has_num_steps: bool


def plan_of(spec: JobSpec) -> JobPlan:
    """Check everything about a job that can be known without its rows.

    Settings of the training stand beside those of the method, as OpenAI's `hyperparameters` have them. Raises
    `InvalidRequestError` that names the field by its path, and the value.
    """
    name, values = method_values(dict(spec.method) or None)
    path = f"method.{name}.hyperparameters"
    training = {field.name for field in fields(TrainingConfig)} - {"method"}
    method = from_json(METHODS[name].config_class, {k: v for k, v in values.items() if k not in training}, path)
    chosen = {key: value for key, value in values.items() if key in training}
    settings = dict(spec.settings)
    own = {field.name for field in fields(Publication)}
    publication = from_json(Publication, {k: settings.pop(k) for k in own & settings.keys()}, "settings")
    for key in settings.keys() & chosen.keys():
        raise InvalidRequestError(f"settings.{key} is given twice, also in {path}", param=f"settings.{key}")
    for key in settings.keys() - training:
        known = ", ".join(sorted(training | own))
        raise InvalidRequestError(f"settings.{key} is not known; known: {known}", param=f"settings.{key}")
    if settings:
        from_json(TrainingConfig, settings, "settings")  # for the name of the field in the error
    config = replace(from_json(TrainingConfig, chosen | settings, path), method=method)
    if spec.template is not None:
        template_fields(spec.template)
    return JobPlan(config, publication, "num_steps" in chosen | settings)


def make_job(
    model: FrozenModel,
    spec: JobSpec,
    data: JobData,
    *,
    warm_start: torch.Tensor | None = None,
    in_service: PromptArtifact | None = None,
) -> tuple[TrainingJob, TaskFormat, Publication]:
    """Read the rows and make the job.

    `in_service` is the prompt that the new one would replace: measured too, where it reads rows the same way. Raises
    `InvalidRequestError` and `TrainingDataError`, which names the line.
    """
    plan = plan_of(spec)
    train = parse_examples(data.training.split(b"\n"))
    if data.validation is not None:
        validation = parse_examples(data.validation.split(b"\n"))
    else:
        train, validation = split_examples(train, plan.publication.validation_share)
    if len(validation) < 2 or not train:
        raise InvalidRequestError(
            f"{len(train)} training and {len(validation)} validation rows are too few: at least 1 and 2 are needed",
            param="training_file",
        )
    task = task_of(spec, train, validation)
    config = plan.config
    if not plan.has_num_steps:
        steps = math.ceil(len(train) / config.batch_size) * NUM_EPOCHS
        config = replace(config, num_steps=min(max(steps, MIN_STEPS), MAX_STEPS))
    replaces = None
    if in_service is not None and (in_service.manifest.template, in_service.manifest.label_words) == (
        task.template,
        task.label_words,
    ):
        replaces = next(iter(in_service.tensors.values()))
    job = TrainingJob(model, config, task, train, validation, warm_start=warm_start, replaces=replaces)
    return job, task, plan.publication


def task_of(spec: JobSpec, train: Sequence[Example], validation: Sequence[Example]) -> TaskFormat:
    """Return how rows read: as the job says, or by what the rows have.

    Rows with labels get a word a label: the label itself, after a space.
    """
    labels = sorted({row.label for row in (*train, *validation) if row.label is not None})
    if not labels:
        return TaskFormat(spec.template)
    unlabelled = next((row.line for row in (*train, *validation) if row.label is None), None)
    if unlabelled is not None:
        raise TrainingDataError(unlabelled, "has a 'completion', but other rows have a 'label'")
    words: Mapping[str, str] = spec.label_words or {label: f" {label}" for label in labels}
    if len(words) < 2:
        raise InvalidRequestError(
            f"at least two labels are needed, got {list(words)!r} in all rows", param="training_file"
        )
    return TaskFormat(spec.template or DEFAULT_LABEL_TEMPLATE, dict(words))

"""From a job's record and its rows to a job that can run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from promptd_store import PromptArtifact

from promptd.errors import InvalidRequestError
from promptd.jobs import JobData, JobSpec
from promptd.modeling import FrozenModel
from promptd.training.config import TrainingConfig
from promptd.training.data import Example, split_examples
from promptd.training.encoding import TaskFormat
from promptd.training.job import TrainingJob
from promptd.training.job_spec import read_rows, sets_num_steps, task_format, training_config, with_label_words

VALIDATION_SHARE = 0.2
"""Part of the rows that is held out where there is no validation file; half of it selects, the other half reports."""
MIN_STEPS, MAX_STEPS, NUM_EPOCHS = 200, 2000, 20
"""A job that names no number of steps sees its rows this often, but takes at least and at most so many steps."""


def make_job(
    model: FrozenModel,
    spec: JobSpec,
    data: JobData,
    *,
    warm_start: torch.Tensor | None = None,
    in_service: PromptArtifact | None = None,
) -> tuple[TrainingJob, TaskFormat]:
    """Read the rows and make the job.

    `in_service` is the prompt that the new one would replace: measured too, where it reads rows the same way. Raises
    `InvalidRequestError` and `TrainingDataError`, which names the line.
    """
    train = read_rows(data.training, spec)
    spec = with_label_words(spec, train)
    if data.validation is not None:
        validation = read_rows(data.validation, spec)
    else:
        train, validation = split_examples(train, VALIDATION_SHARE)
    if not train or len(validation) < 2:  # one row to select by and one to report on
        raise InvalidRequestError(
            f"{len(train)} training and {len(validation)} validation rows are too few: 1 and 2 are the least",
            param="training_file",
        )
    task, config = task_format(spec), training_config(spec)
    if not sets_num_steps(spec):
        config = replace(config, num_steps=default_num_steps(config, train))
    replaces = None
    if in_service is not None and _reads_alike(in_service, task):
        replaces = next(iter(in_service.tensors.values()))
    job = TrainingJob(model, config, task, train, validation, warm_start=warm_start, replaces=replaces)
    return job, task


def default_num_steps(config: TrainingConfig, train: Sequence[Example]) -> int:
    """Return how long to train on so many rows."""
    steps = math.ceil(len(train) / config.batch_size) * NUM_EPOCHS
    return min(max(steps, MIN_STEPS), MAX_STEPS)


def _reads_alike(artifact: PromptArtifact, task: TaskFormat) -> bool:
    manifest = artifact.manifest
    return (manifest.template, manifest.label_words) == (task.template, task.label_words)

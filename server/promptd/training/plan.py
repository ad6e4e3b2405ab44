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
from promptd.modeling.chat_template import PLAIN_TEMPLATE, has_chat_template
from promptd.training.config import TrainingConfig
from promptd.training.context import chain_context
from promptd.training.data import Example, split_examples
from promptd.training.encoding import TaskFormat
from promptd.training.job import TrainingJob
from promptd.training.job_spec import read_rows, sets_num_steps, task_format, training_config, with_label_words

VALIDATION_SHARE = 0.2
"""Part of the rows that is held out where there is no validation file; half of it selects, the other half reports."""
MIN_VALIDATION_ROWS = 2
"""One to select by and one to report on."""
MIN_STEPS, MAX_STEPS, NUM_EPOCHS = 200, 2000, 20
"""A job that names no number of steps sees its rows this often, but takes at least and at most so many steps."""


def make_job(
    model: FrozenModel,
    spec: JobSpec,
    data: JobData,
    *,
    warm_start: torch.Tensor | None = None,
    in_service: Sequence[PromptArtifact] = (),
    behind: Sequence[PromptArtifact] = (),
) -> tuple[TrainingJob, TaskFormat]:
    """Read the rows and make the job.

    `in_service` is the prompt that the new one would replace, behind all that it stands behind: measured too, where it
    reads rows the same way. `behind` is the chain that the new one will stand behind. Raises `InvalidRequestError` and
    `TrainingDataError`, which names the line.
    """
    train = read_rows(data.training, spec)
    spec = with_label_words(spec, train)
    if data.validation is not None:
        validation = read_rows(data.validation, spec)
    else:
        train, validation = split_examples(train, VALIDATION_SHARE, least=MIN_VALIDATION_ROWS)
    if not train or len(validation) < MIN_VALIDATION_ROWS:
        raise InvalidRequestError(
            f"{len(train)} training and {len(validation)} validation rows are too few: 1 and {MIN_VALIDATION_ROWS} are "
            "the least",
            param="training_file",
        )
    task, config = task_format(spec), training_config(spec)
    if task.template is None and not has_chat_template(model) and all(example.messages for example in train):
        task = replace(task, template=PLAIN_TEMPLATE)
    if behind:  # the text reads on as its chain began: where BOS comes first, none stands in front of the text
        task = replace(task, add_special_tokens=behind[-1].manifest.add_special_tokens)
    if not sets_num_steps(spec):
        config = replace(config, num_steps=default_num_steps(config, train))
    job = TrainingJob(
        model,
        config,
        task,
        train,
        validation,
        warm_start=warm_start,
        replaces=chain_context(model, in_service) if in_service and _reads_alike(in_service[-1], task) else None,
        behind=chain_context(model, behind) if behind else None,
    )
    return job, task


def default_num_steps(config: TrainingConfig, train: Sequence[Example]) -> int:
    """Return how long to train on so many rows."""
    steps = math.ceil(len(train) / config.batch_size) * NUM_EPOCHS
    return min(max(steps, MIN_STEPS), MAX_STEPS)


def _reads_alike(artifact: PromptArtifact, task: TaskFormat) -> bool:
    manifest = artifact.manifest
    theirs = (manifest.template, manifest.label_words, manifest.add_special_tokens)
    return theirs == (task.template, task.label_words, task.add_special_tokens)

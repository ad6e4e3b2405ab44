"""From a job's record and its rows to a job that can run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from promptd_store import Manifest, PromptArtifact, PromptKind

from promptd.errors import InvalidRequestError
from promptd.jobs import JobData, JobSpec
from promptd.modeling import FrozenModel
from promptd.modeling.chat_template import PLAIN_TEMPLATE, has_chat_template
from promptd.training.config import TrainingConfig
from promptd.training.context import chain_context
from promptd.training.data import Example, split_examples
from promptd.training.distill_config import DistillConfig
from promptd.training.encoding import TaskFormat, reads_words
from promptd.training.job import TrainingJob
from promptd.training.job_spec import distill_config, read_rows, sets, task_format, training_config, with_label_words
from promptd.training.teacher import Teacher

VALIDATION_SHARE = 0.2
"""Part of the rows that is held out where there is no validation file; half of it selects, the other half reports."""
MIN_VALIDATION_ROWS = 2
"""One to select by and one to report on."""
MIN_STEPS, MAX_STEPS, NUM_EPOCHS = 200, 2000, 20
"""A job that names no number of steps sees its rows this often, but takes at least and at most so many steps."""

Chain = Sequence[PromptArtifact]


@dataclass(frozen=True, slots=True)
class JobPrompts:
    """The stored prompts that a job names, loaded; a chain has in front what its last prompt stands behind."""

    warm_start: torch.Tensor | None = None
    """The folded prompt to begin with."""
    in_service: Chain = ()
    """What the new prompt would replace: measured too, where it reads rows the same way."""
    behind: Chain = ()
    """What the new prompt will stand behind."""
    teacher: Chain = ()
    """What the teacher has in its context where that is no text of the job's own."""


def make_job(
    model: FrozenModel, spec: JobSpec, data: JobData, prompts: JobPrompts | None = None
) -> tuple[TrainingJob, TaskFormat]:
    """Read the rows and make the job. Raises `InvalidRequestError` and `TrainingDataError`, which names the line."""
    prompts, distill = prompts or JobPrompts(), distill_config(spec)
    writes_rows = distill is not None and spec.training_file is None and spec.rows_digest is None
    if distill is not None and writes_rows:
        validation_rows = None if data.validation is None else read_rows(data.validation, spec)
        train, validation = _written_rows(distill, validation_rows)
    else:
        train, validation = _rows(model, spec, data)
    spec = with_label_words(spec, train, asks_for_word=not model.has_sources)
    if not train or len(validation) < MIN_VALIDATION_ROWS:
        raise InvalidRequestError(
            f"{len(train)} training and {len(validation)} validation rows are too few: 1 and {MIN_VALIDATION_ROWS} are "
            "the least",
            param="training_file",
        )
    task, config = task_format(spec), training_config(spec)
    _check_distills(model, distill, writes_rows=writes_rows)
    if model.reads_whole and not reads_words(model, task):
        prompts = replace(prompts, in_service=())  # its head may tell other classes apart
    if task.template is None and not has_chat_template(model) and all(example.messages for example in train):
        task = replace(task, template=PLAIN_TEMPLATE)
    if prompts.behind:
        task = replace(task, add_special_tokens=_special_tokens(model, prompts.behind))
    if not sets(spec, "num_steps"):
        config = replace(config, num_steps=default_num_steps(config, len(train)))
    teacher, in_service, warm_start = None, prompts.in_service, prompts.warm_start
    if distill is not None:
        chain = prompts.teacher or [*prompts.behind, _as_prompt(distill.text or "")]
        teacher = Teacher(model, distill, chain, writes_rows=writes_rows, seed=config.seed)
        if warm_start is None and not sets(spec, "init"):
            warm_start = _beginning(model, config, chain[-1].manifest.text)
        if in_service and (in_service[-1].kind is PromptKind.TEXT or in_service[-1].version == chain[-1].version):
            in_service = ()  # it is what is to be replaced by something shorter, not something to be better than
    job = TrainingJob(
        model,
        config,
        replace(task, template=None) if writes_rows else task,
        train,
        validation,
        warm_start=warm_start,
        replaces=chain_context(model, in_service) if in_service and _reads_alike(model, in_service, task) else None,
        behind=chain_context(model, prompts.behind) if prompts.behind else None,
        teacher=teacher,
    )
    return job, task


def default_num_steps(config: TrainingConfig, num_rows: int) -> int:
    """Return how long to train on so many rows."""
    steps = math.ceil(num_rows / config.batch_size) * NUM_EPOCHS
    return min(max(steps, MIN_STEPS), MAX_STEPS)


def most_steps(spec: JobSpec, num_rows: int) -> int:
    """Return how many steps a job takes at most: rows that are held out are not known before it runs."""
    config = training_config(spec)
    return config.num_steps if sets(spec, "num_steps") else default_num_steps(config, num_rows)


def _rows(model: FrozenModel, spec: JobSpec, data: JobData) -> tuple[list[Example], list[Example]]:
    train = read_rows(data.training, spec)
    if data.validation is None:
        return split_examples(train, VALIDATION_SHARE, least=MIN_VALIDATION_ROWS)
    return train, read_rows(data.validation, with_label_words(spec, train, asks_for_word=not model.has_sources))


def _written_rows(distill: DistillConfig, validation: list[Example] | None) -> tuple[list[Example], list[Example]]:
    """Return beginnings of rows that the teacher goes on with, for training and, where there are none, validation."""
    rows = [Example({"text": distill.cue}, None, None, number) for number in range(1, distill.num_rows + 1)]
    if validation is not None:
        return rows, validation
    num_held_out = round(VALIDATION_SHARE * len(rows))
    return rows[num_held_out:], rows[:num_held_out]


def _beginning(model: FrozenModel, config: TrainingConfig, text: str | None) -> torch.Tensor | None:
    """Return the embeddings of a text's first tokens, as many as are learned: where Cartridges begin."""
    if text is None:
        return None
    ids = model.encode(text, add_special_tokens=False)[: config.method.num_virtual_tokens]
    return model.embed(torch.tensor(ids, device=model.device)).detach().float()


def _as_prompt(text: str) -> PromptArtifact:
    """Return a text as a prompt that nobody stores: it may be longer than a stored one."""
    manifest = Manifest(kind=PromptKind.TEXT, num_virtual_tokens=0, text=text)
    return PromptArtifact(manifest, manifest.version(), content=b"", tensors={})


def _special_tokens(model: FrozenModel, behind: Chain) -> bool | None:
    """Return what a new prompt says about special tokens so that the text reads on as its chain began."""
    stated = behind[-1].manifest.add_special_tokens
    takes = model.takes_special_tokens(behind)
    return False if stated is None and not takes else stated


def _check_distills(model: FrozenModel, distill: DistillConfig | None, *, writes_rows: bool) -> None:
    """Refuse what a model of sources cannot be asked as a teacher."""
    if distill is None or not model.has_sources:
        return
    if model.reads_whole:
        raise InvalidRequestError(
            "this base model writes nothing: it has no distribution of next tokens to distill", param="distill"
        )
    if writes_rows:
        raise InvalidRequestError(
            "this base model answers to texts and does not go on with them: a job that distills needs rows to answer",
            param="training_file",
        )
    if not distill.answer_tokens:
        raise InvalidRequestError(
            "distill.answer_tokens must be at least 1, got 0: this base model does not predict the text it reads",
            param="distill.answer_tokens",
        )


def _reads_alike(model: FrozenModel, chain: Chain, task: TaskFormat) -> bool:
    manifest = chain[-1].manifest
    if (manifest.template, manifest.label_words) != (task.template, task.label_words):
        return False
    return model.takes_special_tokens(chain) == (task.add_special_tokens is not False)

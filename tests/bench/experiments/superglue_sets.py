"""SuperGLUE in two formats: text to text, for models that write, and fields under a head, for models that read whole.

- text: `promptd.evaluation.TASKS` as it is, inputs and targets of the text-to-text transformer without the task's name
  (Raffel et al. 2020; Lester et al. 2021). WSC is generated and trains on its positive rows, ReCoRD is generated.
- head: the fields in the order of the residual prompts' authors' code for BERT (Progressive Prompts, 2023), joined by
  the tokenizer's separator, in one segment; a linear head over what the model pools. Theirs gives WiC and WSC character
  offsets, which say nothing as text: here WSC is the text with its *pronoun* in stars and the candidate. ReCoRD has no
  such format there, nor here.

The published validation rows are halved, by whole paragraphs in MultiRC: one half selects steps and rates, the other
reports. Long fields are cut: the number of words is part of the scores.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from promptd.errors import InvalidRequestError
from promptd.evaluation import TASKS
from promptd.evaluation.rows import find_file, sample
from promptd.evaluation.task import Task
from promptd.training import Example, example_of
from tests.bench.experiments.sets import SetRows, TaskSet, read_set

Format = Literal["text", "head"]

TITLES: Mapping[str, str] = {
    "boolq": "BoolQ", "cb": "CB", "copa": "COPA", "multirc": "MultiRC", "record": "ReCoRD", "rte": "RTE", "wic": "WiC",
    "wsc": "WSC",
}  # fmt: skip
SEPARATOR = "[SEP]"
"""Stands for the tokenizer's own in the templates of heads."""
_HEAD_FIELDS: Mapping[str, tuple[str, ...]] = {
    "boolq": ("passage", "question"),
    "cb": ("premise", "hypothesis"),
    "copa": ("choice1", "choice2", "premise", "question"),
    "multirc": ("question", "answer", "paragraph"),
    "rte": ("premise", "hypothesis"),
    "wic": ("sentence1", "sentence2", "word"),
    "wsc": ("text", "span"),
}
_MAX_WORDS: Mapping[str, Mapping[str, int]] = {
    "boolq": {"passage": 48},
    "cb": {"premise": 64},
    "multirc": {"paragraph": 32},
    "record": {"passage": 32},
    "rte": {"premise": 40},
}
_STEPS: Mapping[str, int] = {
    "boolq": 30, "cb": 80, "copa": 80, "multirc": 24, "record": 24, "rte": 32, "wic": 48, "wsc": 48,
}  # fmt: skip
_WHOLE: Mapping[str, tuple[str, ...]] = {"multirc": ("paragraph",), "record": ("passage",)}


def _task(name: str, how: Format) -> Task:
    if how == "text":
        return TASKS[name]
    template = f" {SEPARATOR} ".join("{" + field + "}" for field in _HEAD_FIELDS[name])
    return dataclasses.replace(TASKS[name], template=template, scores_labels=True)


def _set(name: str, how: Format) -> TaskSet:
    task = _task(name, how)
    halves = _WHOLE.get(name) or (_HEAD_FIELDS[name] if name != "wsc" else ("text",))
    return TaskSet(
        f"{name}-{how}", TITLES[name], task, "", num_steps=_STEPS[name], max_words=_MAX_WORDS.get(name, {}),
        halves=halves,
    )  # fmt: skip


SUPERGLUE: Mapping[str, TaskSet] = {
    f"{name}-{how}": _set(name, how)
    for how, names in (("text", tuple(TITLES)), ("head", tuple(_HEAD_FIELDS)))
    for name in names
}
"""`task-format` -> its set."""


def load_halves(
    chosen: TaskSet, data: Path, seed: int, *, num_train: int, num_validation: int, num_held_out: int
) -> SetRows:
    """Sample training rows by the seed; rows that select and rows that report are the same for every seed."""
    validation = read_set(chosen, data, chosen.task.split)
    keys = [tuple(example.fields[name] for name in chosen.halves) for example in validation]
    order = list(dict.fromkeys(keys))
    random.Random(0).shuffle(order)
    selects = set(order[: len(order) // 2])
    select = [example for example, key in zip(validation, keys, strict=True) if key in selects]
    report = [example for example, key in zip(validation, keys, strict=True) if key not in selects]
    train = _trainable(chosen.task, read_set(chosen, data, chosen.train_split))
    random.Random(seed).shuffle(train)
    return SetRows(
        train[:num_train],
        sample(_trainable(chosen.task, select), chosen.task, num_validation),
        sample(report, chosen.task, num_held_out),
    )


def _trainable(task: Task, examples: Sequence[Example]) -> list[Example]:
    """Return the rows that teach: where labels are generated, those that say what is to be written."""
    if task.scores_labels:
        return list(examples)
    rows = [(example.line, task.training_row({**example.fields, "label": example.label or ""})) for example in examples]
    return [example_of(line, row) for line, row in rows if row is not None]


def count_rows(data: Path) -> dict[str, dict[str, int] | str]:
    """Return, for every task, its published rows in this folder by split, or what is missing."""
    return {name: _counted(SUPERGLUE[f"{name}-text"], data) for name in TITLES}


def _counted(chosen: TaskSet, data: Path) -> dict[str, int] | str:
    splits = (chosen.train_split, chosen.task.split)
    try:
        for split in splits:
            find_file(data, dataclasses.replace(chosen.task, split=split))
    except InvalidRequestError as error:
        return error.message
    return {split: len(read_set(chosen, data, split)) for split in splits}

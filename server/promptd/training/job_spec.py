"""What a job asks for, as the trainer's settings and rows: every check that needs no model."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from promptd_store import template_fields
from promptd_store.strict_json import shown

from promptd.errors import InvalidRequestError
from promptd.jobs import JobSpec
from promptd.training.checks import describe_fields, from_json
from promptd.training.config import TrainingConfig
from promptd.training.data import Example, TrainingDataError, parse_examples, render
from promptd.training.distill_config import DistillConfig
from promptd.training.encoding import TaskFormat
from promptd.training.methods import METHODS, method_values

MAX_LABELS = 1024
LABEL_TEMPLATE = "{text}\nLabel:"
"""How rows with labels read where the job has no template."""

_GENERAL = [field.name for field in fields(TrainingConfig) if field.name not in ("method", "seed")]


def training_config(spec: JobSpec) -> TrainingConfig:
    """Return the checked settings; `method.<name>.hyperparameters` has the method's own and the general ones.

    Raises `InvalidRequestError` whose `param` is the field's whole path.
    """
    name, values = method_values(spec.method)
    config_class = METHODS[name].config_class
    path = f"method.{name}.hyperparameters"
    own = [field.name for field in fields(config_class)]
    for field, value in values.items():
        if field not in own and field not in _GENERAL:
            known = ", ".join([*own, *_GENERAL])
            raise InvalidRequestError(
                f"{path}.{field} is not known (got {shown(value)}); known: {known}", param=f"{path}.{field}"
            )
    method = from_json(config_class, {field: values[field] for field in own if field in values}, path)
    general = {field: values[field] for field in _GENERAL if field in values}
    if "seed" in spec.settings:
        general["seed"] = spec.settings["seed"]
    return from_json(TrainingConfig, {**general, "method": method}, path)


def describe_methods() -> list[dict[str, Any]]:
    """Return every method with its hyper-parameters, own and general: type, default, what is allowed."""
    general = describe_fields(TrainingConfig, _GENERAL)
    return [
        {
            "id": name,
            "is_default": name == next(iter(METHODS)),
            "hyperparameters": {**describe_fields(method.config_class), **general},
        }
        for name, method in METHODS.items()
    ]


def sets(spec: JobSpec, hyperparameter: str) -> bool:
    """Whether the job itself says what this shall be."""
    return hyperparameter in method_values(spec.method)[1]


def distill_config(spec: JobSpec) -> DistillConfig | None:
    """Return what is distilled, checked; None for a job that learns from its rows' own targets.

    Raises `InvalidRequestError` whose `param` is the field's whole path.
    """
    return None if spec.distill is None else from_json(DistillConfig, spec.distill, "distill")


def task_format(spec: JobSpec) -> TaskFormat:
    """Return how rows become text."""
    return TaskFormat(spec.template, spec.label_words)


def check_spec(spec: JobSpec) -> None:
    """Raise `InvalidRequestError` or `TemplateError` for settings that no training would take."""
    training_config(spec)
    distill_config(spec)
    template_fields(spec.template)
    if spec.label_words is not None and len(spec.label_words) < 2:
        raise InvalidRequestError(
            f"label_words must name at least two labels, got {shown(dict(spec.label_words))}", param="label_words"
        )


def read_rows(content: bytes, spec: JobSpec) -> list[Example]:
    """Return the rows, each of which fits the template and the label words.

    Conversations have a form of their own, see `modeling/chat_template.py`. Raises `TrainingDataError`, which names the
    line.
    """
    examples = parse_examples(content.split(b"\n"), are_questions=spec.distill is not None)
    for example in examples:
        if not example.messages:
            render(spec.template, example)
        if spec.label_words is not None and example.label not in (None, *spec.label_words):
            known = list(spec.label_words)
            raise TrainingDataError(example.line, f"label {shown(example.label)} has no label word; known: {known!r}")
        if (example.label is None) != (examples[0].label is None):
            kinds = ("a completion", "a label") if example.label is None else ("a label", "a completion")
            raise TrainingDataError(
                example.line, f"has {kinds[0]}, but line {examples[0].line} has {kinds[1]}: use one kind"
            )
    return examples


def with_label_words(spec: JobSpec, examples: list[Example], *, asks_for_word: bool) -> JobSpec:
    """Return the job with a template, and the labels as their own words, where its rows have labels and it names none.

    `asks_for_word`: whether the label's word is read behind the text, which has to ask for it then. Raises
    `InvalidRequestError` where there is nothing to tell apart, or too much.
    """
    labels = sorted({example.label for example in examples if example.label is not None})
    if not labels:
        return spec
    if asks_for_word:
        spec = replace(spec, template=spec.template or LABEL_TEMPLATE)
    if spec.label_words is not None:
        return spec
    if not 2 <= len(labels) <= MAX_LABELS:
        raise InvalidRequestError(
            f"the rows have {len(labels)} different labels, 2 to {MAX_LABELS} can be told apart; "
            f"the first one is {shown(labels[0])}",
            param="rows" if spec.training_file is None else "training_file",
            code="invalid_training_data",
        )
    return replace(spec, label_words={label: f" {label}" for label in labels})

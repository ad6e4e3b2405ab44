"""What a learner answers on the held-out rows of a published task, and what that scores by the task's own metrics."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from promptd.evaluation.metrics import PERCENT_METRICS, label_scores, text_scores
from promptd.evaluation.rows import items_of
from promptd.evaluation.task import Task
from promptd.training import Encoded, Example, LabelObjective, Objective, PromptedTexts
from promptd.training.objectives import Tally
from tests.bench.experiments.readers import Reader

Encode = Callable[[Sequence[Example]], list[Encoded]]


class Told(Objective):
    """Passes on to another objective, and notes which label each row is given: ties to the first."""

    def __init__(self, inner: Objective, labels: Sequence[str]) -> None:
        self._inner, self._labels = inner, labels
        self.has_labels, self.num_classes = inner.has_labels, inner.num_classes
        self._told: dict[int, str] = {}

    def texts(self, rows: Sequence[Encoded], prompt: torch.Tensor | None) -> PromptedTexts:
        """As the other."""
        return self._inner.texts(rows, prompt)

    def tally(self, rows: Sequence[Encoded], logits: torch.Tensor) -> Tally:
        """As the other."""
        inner = self._inner
        if isinstance(inner, LabelObjective):
            scores = inner.scores(len(rows), logits)
        else:
            scores = logits.expand(-1, len(self._labels))
        for row, best in zip(rows, scores.argmax(1).tolist(), strict=True):
            self._told[id(row)] = self._labels[best]
        return inner.tally(rows, logits)

    def num_tokens(self, row: Encoded) -> int:
        """As the other."""
        return self._inner.num_tokens(row)

    def num_terms(self, rows: Sequence[Encoded]) -> int:
        """As the other."""
        return self._inner.num_terms(rows)

    def of(self, rows: Sequence[Encoded]) -> list[str]:
        """Return what rows that have been measured were given."""
        return [self._told[id(row)] for row in rows]


def scored(
    task: Task, reader: Reader, objective: Objective, encode: Encode, examples: Sequence[Example]
) -> dict[str, Any]:
    """Return `num_rows`, `metrics` and, of fractions, their mean, the `score`; `loss` where labels are scored.

    Raises `ValueError` where the reader can write nothing and the task's answers must be written.
    """
    found: dict[str, Any] = {"num_rows": len(examples)}
    if task.has_labels and task.scores_labels:
        rows, told = encode(examples), Told(objective, tuple(task.label_words or ()))
        found["loss"] = reader.scores(told, rows).to_json()["loss"]
        metrics = _label_metrics(task, told.of(rows), examples)
    elif task.has_labels:
        texts = _written(task, reader, encode, [dataclasses.replace(example, label=None) for example in examples])
        words = task.label_words or {}
        said = [task.read_label(text, words, one.fields) for text, one in zip(texts, examples, strict=True)]
        metrics = _label_metrics(task, said, examples)
    else:
        items = items_of(examples)
        asked = [dataclasses.replace(item.example, completion=None) for item in items]
        metrics = text_scores(task.metrics, _written(task, reader, encode, asked), [item.references for item in items])
    metrics = {name: round(value, 4) for name, value in metrics.items()}
    if PERCENT_METRICS.isdisjoint(metrics):  # otherwise they have no mean
        found["score"] = round(statistics.mean(metrics.values()), 4)
    return {**found, "metrics": metrics}


def constant_score(task: Task, examples: Sequence[Example]) -> float | None:
    """Return the best score of one and the same label for every row; None where answers are texts."""
    if not task.has_labels:
        return None
    constants = [[label] * len(examples) for label in task.label_words or ()]
    return max(round(statistics.mean(_label_metrics(task, said, examples).values()), 4) for said in constants)


def _label_metrics(task: Task, said: Sequence[str | None], examples: Sequence[Example]) -> dict[str, float]:
    truth = [example.label or "" for example in examples]
    groups = [tuple(example.fields[name] for name in task.group) for example in examples]
    return label_scores(task.metrics, said, truth, labels=tuple(task.label_words or ()), groups=groups)


def _written(task: Task, reader: Reader, encode: Encode, asked: Sequence[Example]) -> list[str]:
    texts = [row.source_ids or row.text_ids for row in encode(asked)]
    answers = reader.answers(texts, task.max_tokens)
    if answers is None:
        raise ValueError(f"{type(reader).__name__} writes nothing; {task.name} is generated")
    return [answer.strip() for answer in answers]

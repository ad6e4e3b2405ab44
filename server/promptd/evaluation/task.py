"""What is evaluated: how a published row reads, which words stand for its labels, what is measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promptd.evaluation.metrics import TEXT_METRICS
from promptd.training import Example, TrainingDataError

Source = Mapping[str, Any]
"""One row as the data set was published."""
Row = dict[str, str]
"""One row as jobs take it: named fields and `label` or `completion`."""

CLASSIFICATION_METRICS = ("accuracy", "macro_f1", "matthews")
GENERATION_METRICS = tuple(TEXT_METRICS)
LABEL_TOKENS = 12
"""Enough for any label word that is generated in place of being scored."""
TEXT_TOKENS = 64


def as_published(source: Source) -> list[Row]:
    """The row as it is."""
    return [dict(source)]


def same_row(row: Row) -> Row | None:
    """Train on the row that is evaluated."""
    return row


def starts_with_word(text: str, words: Mapping[str, str], fields: Mapping[str, str]) -> str | None:
    """Return the label whose word a generated text begins with, the longest first; None: an illegal output."""
    said = text.strip()
    for label, word in sorted(words.items(), key=lambda item: -len(item[1])):
        if re.match(re.escape(word.strip()) + r"(?!\w)", said):
            return label
    return None


@dataclass(frozen=True, slots=True)
class Task:
    """One task. Everything that shapes the text is part of its results, because it shapes the scores."""

    name: str
    title: str
    metrics: tuple[str, ...]
    template: str | None = None
    label_words: Mapping[str, str] | None = None
    """label -> the continuation that stands for it; None: the answer is a text."""
    convention: str = "rows"
    """Whose way of writing the task as text this is."""
    dataset: str = ""
    """Folder of the published rows."""
    split: str = "validation"
    rows: Callable[[Source], list[Row]] = as_published
    """One published row -> the rows to evaluate."""
    training_row: Callable[[Row], Row | None] = same_row
    """One row to evaluate -> the row to train on, or None to leave it out."""
    read_label: Callable[[str, Mapping[str, str], Mapping[str, str]], str | None] = starts_with_word
    """(generated text, label words, fields) -> label."""
    group: tuple[str, ...] = ()
    """Fields that rows which belong together have in common."""
    scores_labels: bool = True
    """Whether the label words can be scored; False where the answer must be generated and read."""
    max_tokens: int = TEXT_TOKENS
    stop: tuple[str, ...] = ("\n",)

    @property
    def has_labels(self) -> bool:
        """Whether rows are classified."""
        return self.label_words is not None


def task_of(examples: Sequence[Example], name: str = "rows") -> Task:
    """Return the generic task of rows in our own format: `classification` or `generation`, the input as it is.

    Label words that nobody gives are the labels themselves. Raises `TrainingDataError` where rows are mixed, or
    conversations.
    """
    spoken = next((example for example in examples if example.messages), None)
    if spoken is not None:
        raise TrainingDataError(spoken.line, "is a conversation; evaluation takes rows of fields")
    labels = {example.label for example in examples if example.label is not None}
    if not labels:
        return Task(name, "generation", GENERATION_METRICS)
    first = next((example for example in examples if example.label is None), None)
    if first is not None:
        raise TrainingDataError(first.line, "has a completion, but other rows have labels; evaluate them apart")
    words = {label: f" {label}" for label in sorted(labels)}
    return Task(name, "classification", CLASSIFICATION_METRICS, label_words=words, max_tokens=LABEL_TOKENS)

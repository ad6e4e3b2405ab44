"""One run: every input for every subject, in mixed batches, then what the answers score."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from promptd.evaluation.backend import Backend
from promptd.evaluation.entry import TOO_LONG, Answer, Entry, best_label, constants_of, ensemble_of, enter
from promptd.evaluation.metrics import label_scores
from promptd.evaluation.result import AnswerBy, EvaluationResult, RowPrediction
from promptd.evaluation.rows import Item, items_of
from promptd.evaluation.task import Task
from promptd.evaluation.text_scores import score_texts
from promptd.training import Example


async def evaluate(
    backend: Backend,
    task: Task,
    examples: Sequence[Example],
    prompts: Sequence[str | None] = (None,),
    *,
    ensemble: bool = False,
    answer_by: AnswerBy = "score",
    num_beams: int = 1,
    keep_predictions: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[EvaluationResult]:
    """Measure prompts (None: the bare model) on rows.

    Returns the majority class where there are labels, one result a prompt, and the ensemble of all named prompts where
    it was asked for. The bare model is asked in the form of the first named prompt, and left out where that is a head
    of the prompt's own. An ensemble takes the mean
    probability of scored labels, the majority of everything else, ties to the first. What is generated is so by beam
    search where `num_beams` is more than 1. `on_progress` gets the inputs
    done and the inputs in all. An input that exceeds the model's length counts as wrong. Raises typed errors before
    anything runs where rows, prompts and task do not fit.
    """
    started = time.monotonic()
    way: AnswerBy = "score" if task.has_labels and task.scores_labels and answer_by == "score" else "generate"
    items = items_of(examples)
    entries = await enter(backend, task, prompts, items, by_score=way == "score")
    members = [entry for entry in entries if entry.subject is not None]
    if ensemble:
        ensemble_of(members)  # refused before anything runs
    size = max(1, backend.batch_size // len(entries))
    for start in range(0, len(items), size):
        chunk = items[start : start + size]
        for alike in _alike(entries):
            if way == "score":
                await _score(backend, alike, chunk)
            else:
                await _generate(backend, task, alike, chunk, num_beams)
        if on_progress is not None:
            on_progress(start + len(chunk), len(items))
    if ensemble:
        entries.append(ensemble_of(members))
    if task.has_labels:
        entries.insert(0, _best_constant(task, constants_of(entries[0].form, items), items))
    seconds = time.monotonic() - started

    scores = await _scores(task, entries, items)
    return [
        EvaluationResult(
            subject=entry.name,
            task=task.name,
            convention=task.convention,
            template=entry.form.template,
            label_words=entry.form.label_words or None,
            answer_by=way,
            num_beams=num_beams if way == "generate" else 1,
            metrics=own,
            num_rows=len(examples),
            num_inputs=len(items),
            num_too_long=sum(answer.is_too_long for answer in entry.answers),
            prompt_versions=entry.versions,
            seconds=seconds,
            predictions=_predictions(entry, items) if keep_predictions else None,
        )
        for entry, own in zip(entries, scores, strict=True)
    ]


def _alike(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Group the subjects that can be asked in one batch."""
    groups: dict[object, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.form.asks, []).append(entry)
    return list(groups.values())


async def _score(backend: Backend, alike: Sequence[Entry], chunk: Sequence[Item]) -> None:
    questions = [entry.question(item) for entry in alike for item in chunk]
    given = iter(await backend.classify(questions, alike[0].form.label_words or None))
    for entry in alike:
        for probabilities in itertools.islice(given, len(chunk)):
            entry.answers.append(TOO_LONG if probabilities is None else best_label(entry.form, probabilities))


async def _generate(
    backend: Backend, task: Task, alike: Sequence[Entry], chunk: Sequence[Item], num_beams: int
) -> None:
    questions = [entry.question(item) for entry in alike for item in chunk]
    form = alike[0].form
    given = iter(await backend.generate(questions, form.max_tokens, form.stop, num_beams))
    for entry in alike:
        for item, text in zip(chunk, given, strict=False):
            if text is None:
                entry.answers.append(TOO_LONG)
            elif task.has_labels:
                entry.answers.append(Answer(task.read_label(text, form.label_words, item.example.fields)))
            else:
                entry.answers.append(Answer(text.strip()))


def _best_constant(task: Task, constants: Sequence[Entry], items: Sequence[Item]) -> Entry:
    """Return the majority class; where F1 of one label is measured, that label may be the better constant."""
    return max(constants, key=lambda entry: _label_scores(task, entry, items)[task.metrics[0]])


async def _scores(task: Task, entries: Sequence[Entry], items: Sequence[Item]) -> list[dict[str, float]]:
    if task.has_labels:
        return [_label_scores(task, entry, items) for entry in entries]
    texts = [[answer.prediction or "" for answer in entry.answers] for entry in entries]
    return await score_texts(task.metrics, texts, [item.references for item in items])


def _label_scores(task: Task, entry: Entry, items: Sequence[Item]) -> dict[str, float]:
    predictions = [answer.prediction for answer in entry.answers]
    truth = [item.example.label or "" for item in items]
    groups = [tuple(item.example.fields[name] for name in task.group) for item in items]
    return label_scores(task.metrics, predictions, truth, labels=entry.form.labels, groups=groups)


def _predictions(entry: Entry, items: Sequence[Item]) -> tuple[RowPrediction, ...]:
    return tuple(
        RowPrediction(item.example.line, answer.prediction, item.references or (item.example.label or "",))
        for item, answer in zip(items, entry.answers, strict=True)
    )

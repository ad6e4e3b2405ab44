"""Texts that are written: descriptions of restaurants (E2E) and of triples (WebNLG), headlines of news.

Published splits stay what they are: training rows train, validation rows select steps and rates, test rows report. A
learner reads one reference of an input at a time; what it writes is scored against all of them. WebNLG's test rows are
of categories that training rows have (seen) or have not (unseen), and are scored apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from promptd.evaluation import Task
from promptd.evaluation.rows import sample
from promptd.evaluation.task import Row, Source
from promptd.training import Example
from tests.bench.experiments.sets import SetRows, TaskSet, read_set


def _one_target(source: Source) -> list[Row]:
    return [{"text": source["input"], "completion": source["target"] + "\n"}]


def _described(source: Source) -> list[Row]:
    """One row a reference; names have spaces for underscores."""
    text = source["input"].replace("_", " ")
    return [{"text": text, "completion": target + "\n"} for target in source["targets"]]


def _seen(source: Source) -> list[Row]:
    return _described(source) if source.get("seen", True) else []  # only test rows say it


def _unseen(source: Source) -> list[Row]:
    return [] if source.get("seen", True) else _described(source)


def _task(name: str, dataset: str, rows: Callable[[Source], list[Row]]) -> Task:
    return Task(
        name, "texts", ("bleu", "rouge_l"), "{text}\n", dataset=dataset, split="test", rows=rows, group=("text",)
    )


_ALL = (
    TaskSet(
        "e2e-texts", "E2E", _task("e2e-texts", "e2e_nlg", _one_target), "", num_steps=160, selects_from="validation"
    ),
    TaskSet(
        "webnlg-texts", "WebNLG, seen categories", _task("webnlg-texts", "webnlg2017", _seen), "", num_steps=160,
        selects_from="validation", shifts=("webnlg-unseen",),
    ),
    TaskSet(
        "webnlg-unseen", "WebNLG, unseen categories", _task("webnlg-unseen", "webnlg2017", _unseen), "", num_steps=0,
        selects_from="validation",
    ),
    TaskSet(
        "headlines-texts", "headlines", _task("headlines-texts", "wikinews_headlines", _one_target), "", num_steps=160,
        selects_from="validation", max_words={"text": 40},
    ),
)  # fmt: skip

TEXT_SETS: Mapping[str, TaskSet] = {each.name: each for each in _ALL}


def load_published(
    chosen: TaskSet, data: Path, seed: int, *, num_train: int, num_validation: int, num_held_out: int
) -> SetRows:
    """Sample training rows by the seed; rows that select and rows that report are the same for every seed.

    `num_validation` and `num_held_out` count inputs: a selecting one has its first reference, a reporting one all.
    """
    train = list(read_set(chosen, data, chosen.train_split)) if num_train else []
    random.Random(seed).shuffle(train)
    select = read_set(chosen, data, chosen.selects_from) if num_validation else ()
    return SetRows(
        train[:num_train],
        _first_references(select, chosen, num_validation),
        _inputs(read_set(chosen, data, chosen.task.split), chosen, num_held_out),
    )


def _first_references(examples: Sequence[Example], chosen: TaskSet, count: int) -> list[Example]:
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.fields["text"], example)
    return sample(list(first.values()), chosen.task, count)


def _inputs(examples: Sequence[Example], chosen: TaskSet, count: int) -> list[Example]:
    """Take about so many inputs, by a hash, with all that was written of each."""
    chosen_texts = {example.fields["text"] for example in _first_references(examples, chosen, count)}
    return [example for example in examples if example.fields["text"] in chosen_texts]

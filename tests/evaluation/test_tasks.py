"""The tasks: text and targets as published, read from real slices where their licence allows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from promptd_store import render_template

from promptd.commands.evaluate import TASK_NAMES
from promptd.errors import InvalidRequestError
from promptd.evaluation import TASKS, metrics, read_rows, task_of
from promptd.evaluation.rows import items_of
from promptd.training import TrainingDataError, parse_examples

DATA = Path(__file__).parents[1] / "data"
MADE_UP: dict[str, dict[str, Any]] = {
    "cb": {"premise": "It may rain.", "hypothesis": "it rains", "label": "neutral"},
    "rte": {"premise": "It rains.", "hypothesis": "Water falls.", "label": "entailment"},
    "wic": {"word": "bank", "sentence1": "The bank.", "sentence2": "A bank.", "start1": 4, "label": "true"},
    "sst2": {"text": "a joy", "label": "positive"},
    "trec": {"text": "Who am I ?", "label": "human", "fine_label": "HUM:ind"},
    "record": {
        "passage": {
            "text": "Ann met Bob in Rome\n@highlight\nBob left.\n@highlight\nRome stayed",
            "entities": [{"start": 8, "end": 10}, {"start": 0, "end": 2}, {"start": 31, "end": 33}],
        },
        "qas": [{"query": "@placeholder left Ann", "answers": [{"text": "Bob"}, {"text": "Bob"}, {"text": "Robert"}]}],
    },
    "ag_news": {"text": "Shares rose.", "label": "Business"},
    "multirc": {
        "passage": "<b>Sent 1: </b>Ann sang.<br>Bob slept.",
        "questions": [
            {"question": "Who sang?", "answers": [{"text": "Ann", "label": "true"}, {"text": "Bob", "label": "false"}]},
            {"question": "Who slept?", "answers": [{"text": "Bob", "label": "true"}]},
        ],
    },
}
TEXTS = {
    "cb": "hypothesis: it rains premise: It may rain.",
    "rte": "hypothesis: Water falls. premise: It rains.",
    "wic": "sentence1: The bank. sentence2: A bank. word: bank",
    "sst2": "sentence: a joy",
    "trec": "question: Who am I ?",
    "record": "query: @placeholder left Ann entities: Bob, Ann passage: Ann met Bob in Rome. Bob left. Rome stayed",
    "ag_news": "text: Shares rose.",
    "multirc": "question: Who sang? answer: Ann paragraph: Sent 1: Ann sang. Bob slept.",
}


def folder_of(name: str, tmp_path: Path) -> Path:
    """The folder of data sets that has this task: the slices in tests/data, or one made of a made-up row."""
    if name not in MADE_UP:
        return DATA
    task = TASKS[name]
    (tmp_path / task.dataset).mkdir()
    path = tmp_path / task.dataset / f"{task.split}.jsonl"
    path.write_text(json.dumps(MADE_UP[name]) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_rows(name: str, tmp_path: Path) -> None:
    """Each row renders under the template and has one of the task's labels, or references; training rows parse."""
    task = TASKS[name]
    examples = read_rows(folder_of(name, tmp_path), task)
    for example in examples:
        render_template(task.template, example.fields)
        assert example.label in task.label_words if task.label_words else example.completion
        target = {"label": example.label} if example.label else {"completion": example.completion or ""}
        row = task.training_row({**example.fields, **target})
        assert row is None or parse_examples([json.dumps(row)])
    if name in TEXTS:
        assert render_template(task.template, examples[0].fields) == TEXTS[name]
    empty = metrics.label_scores if task.has_labels else metrics.text_scores
    options = {"labels": list(task.label_words or ()), "groups": [0]} if task.has_labels else {}
    scores = empty(task.metrics, ["true"], ["true"] if task.has_labels else [["true"]], **options)  # type: ignore[operator]
    assert list(scores) == list(task.metrics)


def test_the_command_names_every_task() -> None:
    """Its help is written without importing the tasks."""
    assert tuple(TASKS) == TASK_NAMES


def test_boolq_and_copa_read_as_published() -> None:
    """The title stands in front of the passage; targets are False and True, choice1 and choice2."""
    boolq = TASKS["boolq"]
    source = json.loads((DATA / "superglue_boolq/validation.jsonl").read_text(encoding="utf-8").splitlines()[0])
    (row,) = boolq.rows(source)
    expected = f"passage: {source['title']} -- {source['passage']} question: {source['question']}"
    assert render_template(boolq.template, row) == expected
    assert boolq.label_words == {"false": " False", "true": " True"}
    copa = read_rows(DATA, TASKS["copa"])[0]
    assert render_template(TASKS["copa"].template, copa.fields) == (
        "choice1: The toilet filled with water. choice2: Water flowed from the spout. "
        "premise: The man turned on the faucet. question: effect"
    )


def test_multirc_is_one_row_an_answer_grouped_by_question(tmp_path: Path) -> None:
    """Three answers of two questions; the group is paragraph and question."""
    task = TASKS["multirc"]
    examples = read_rows(folder_of("multirc", tmp_path), task)
    assert [example.label for example in examples] == ["true", "false", "true"]
    assert len({tuple(example.fields[name] for name in task.group) for example in examples}) == 2
    assert len(read_rows(tmp_path, task, limit=1)) in (1, 2)  # whole questions


def test_record_has_a_reference_for_each_distinct_answer(tmp_path: Path) -> None:
    """An entity that is named twice is listed once; the rows of a query are references of one input."""
    examples = read_rows(folder_of("record", tmp_path), TASKS["record"])
    assert [example.completion for example in examples] == [" Bob", " Robert"]
    (item,) = items_of(examples)
    assert item.references == ("Bob", "Robert")


def test_wsc_marks_the_pronoun_and_reads_referents() -> None:
    """The pronoun at the index gets stars; only positive rows are trained on; determiners do not count."""
    task = TASKS["wsc"]
    examples = read_rows(DATA, task)
    assert examples[0].fields["text"] == (
        "The large ball crashed right through the table because *it* was made of styrofoam."
    )
    kept = [task.training_row({**example.fields, "label": example.label or ""}) for example in examples]
    assert [row is not None for row in kept] == [example.label == "true" for example in examples]
    assert kept[0] is not None and kept[0]["completion"] == " The table"
    fields, words = {"span": "The table"}, task.label_words or {}
    readings = {"a table.": "true", "the large table": "true", "the ball": "false", "the": None, "": None}
    assert {text: task.read_label(text, words, fields) for text in readings} == readings
    twice = {"text": "it is as it was", "span1_text": "x", "span2_text": "it", "span2_index": 3, "label": "true"}
    assert task.rows(twice)[0]["text"] == "it is as *it* was"
    with pytest.raises(KeyError, match="'she' in the text"):
        task.rows({**twice, "span2_text": "she"})


def test_generated_labels_are_read_strictly() -> None:
    """A label's word at the beginning, the longest first, and nothing glued to it; everything else is illegal."""
    task, fields = TASKS["rte"], {"text": ""}
    words = {"yes": " yes", "yes and no": " yes and no"}
    for text, expected in ((" yes", "yes"), (" yes and no.", "yes and no"), (" yesterday", None), ("no", None)):
        assert task.read_label(text, words, fields) == expected


def test_references_of_one_input_become_one_item() -> None:
    """E2E: 24 lines, fewer inputs, every reference kept."""
    examples = read_rows(DATA, TASKS["e2e"])
    items = items_of(examples)
    assert len(items) < len(examples) == sum(len(item.references) for item in items)
    assert len({item.example.fields["text"] for item in items}) == len(items)


def test_limit_and_where(tmp_path: Path) -> None:
    """A sample is the same in every run and keeps whole inputs; `where` picks one user's rows."""
    task = TASKS["e2e"]
    some = read_rows(DATA, task, limit=6)
    assert some == read_rows(DATA, task, limit=6) and 6 <= len(some) < 24
    chosen = {example.fields["text"] for example in some}
    assert len([1 for example in read_rows(DATA, task) if example.fields["text"] in chosen]) == len(some)
    shakespeare = TASKS["shakespeare"]
    users = {example.fields["user"] for example in read_rows(DATA, shakespeare)}
    user = min(users)
    assert {example.fields["user"] for example in read_rows(DATA, shakespeare, where={"user": user})} == {user}
    with pytest.raises(InvalidRequestError, match="no rows with user=nobody"):
        read_rows(DATA, shakespeare, where={"user": "nobody"})


def test_bad_rows_are_named(tmp_path: Path) -> None:
    """A row of another set names its line and what it has; mixed rows and folders are refused."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"passage": "x", "question": "y", "label": "true"}\n{"text": "z", "label": "a"}\n')
    with pytest.raises(TrainingDataError, match=r"line 2: is not a row of superglue_boolq: KeyError\('passage'\)"):
        read_rows(path, TASKS["boolq"])
    path.write_text('{"text": "x", "label": "a"}\n\n{"text": "z", "completion": "b"}\n')
    with pytest.raises(InvalidRequestError, match="line 3: has a completion, but other rows have labels"):
        task_of(read_rows(path))
    with pytest.raises(InvalidRequestError, match="name a file, or a task"):
        read_rows(tmp_path)
    with pytest.raises(InvalidRequestError, match="has no superglue_cb/validation"):
        read_rows(tmp_path, TASKS["cb"])

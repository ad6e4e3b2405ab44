"""The tasks of the experiments: published rows, the text around them, the words that stand for labels.

Texts and label words are not those of `promptd.evaluation.TASKS`: a model of 5 million parameters knows few of the
published label words, and most of them are several tokens to it. Each set names its own; they are part of the scores.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from promptd.evaluation import TASKS, Task, read_rows
from promptd.evaluation.task import as_published
from promptd.training import Example, TaskFormat


@dataclass(frozen=True, eq=False)
class TaskSet:
    """One task: where its rows are, how they read, and how long training takes."""

    name: str
    title: str
    task: Task
    """With the experiments' own template and label words."""
    instruction: str
    """What somebody would write in front for a model that follows instructions."""
    num_steps: int
    max_words: Mapping[str, int] = field(default_factory=dict)
    """Fields, and the completion, are cut after so many words: attention of long rows is most of the cost."""
    train_split: str = "train"
    num_shots: int = 4
    """Examples in context."""
    shifts: tuple[str, ...] = ()
    """Other sets with the same labels, on which the prompt is scored without more training."""
    by_user: bool = False
    """One user's rows alone: the user with the most rows for seed 0, the next for seed 1, and so on."""
    halves: tuple[str, ...] = ()
    """Where set, one half of the published validation rows selects and the other reports, for every seed the same; rows
    that are equal in these fields fall on one side."""
    selects_from: str = ""
    """Where set, the rows of this published split select, and those of the task's own report."""

    @property
    def is_published(self) -> bool:
        """Whether no training row is kept apart to select."""
        return bool(self.halves or self.selects_from)

    @property
    def format(self) -> TaskFormat:
        """How rows become text; a completion ends with its line, or with the text where labels are generated."""
        words = self.task.label_words if self.task.scores_labels else None
        return TaskFormat(self.task.template, words, append_eos=bool(self.halves))


@dataclass(frozen=True)
class SetRows:
    """Rows of one seed; validation selects steps and learning rates, held-out rows only report."""

    train: Sequence[Example]
    validation: Sequence[Example]
    held_out: Sequence[Example]


def _own(name: str, template: str, words: Mapping[str, str] | None = None) -> Task:
    return dataclasses.replace(TASKS[name], template=template, label_words=words)


def _reviews(name: str, dataset: str) -> Task:
    return Task(
        name, "sentiment", ("accuracy",), _SENTIMENT_TEMPLATE, _SENTIMENT_WORDS, dataset=dataset, split="test"
    )  # fmt: skip


_SENTIMENT_TEMPLATE = "{text} It was"
_SENTIMENT_WORDS = {"negative": " poor", "positive": " great"}
_SENTIMENT = "Say of each sentence whether it is poor or great.\n"

_ALL = (
    TaskSet(
        "sst2", "SST-2: sentiment, 2 classes", _own("sst2", _SENTIMENT_TEMPLATE, _SENTIMENT_WORDS), _SENTIMENT,
        num_steps=500, max_words={"text": 40}, shifts=("mr", "cr"),
    ),
    TaskSet(
        "trec", "TREC: question type, 6 classes",
        _own("trec", "{text} Answer: the", {
            "abbreviation": " name", "description": " reason", "entity": " thing", "human": " man",
            "location": " city", "number": " number",
        }),
        "Say of each question whether it asks for a name, a reason, a thing, a man, a city or a number.\n",
        num_steps=500, num_shots=6,
    ),
    TaskSet(
        "ag_news", "AG News: topic, 4 classes",
        _own("ag_news", "{text} This is about the", {
            "World": " government", "Sports": " team", "Business": " company", "Sci/Tech": " system",
        }),
        "Say of each text whether it is about a government, a team, a company or a system.\n",
        num_steps=200, max_words={"text": 24},
    ),
    TaskSet(
        "rte", "RTE: entailment, 2 classes",
        _own("rte", "{premise} {hypothesis} The answer is", {"entailment": " yes", "not_entailment": " no"}),
        "Does the first sentence say that the second is true? Answer yes or no.\n",
        num_steps=30, max_words={"premise": 30},
    ),
    TaskSet(
        "e2e", "E2E: restaurant descriptions", _own("e2e", "{text}\n"),
        "Describe the restaurant in one sentence.\n", num_steps=60, num_shots=3,
    ),
    TaskSet(
        "shakespeare", "Shakespeare: answers of one character", _own("shakespeare", "{text}\n"),
        "Answer as a character of the play.\n", num_steps=50, num_shots=3,
        max_words={"text": 30, "completion": 30}, by_user=True,
    ),
    TaskSet(
        "snips", "Snips: intent of a voice command, 7 classes",
        Task(
            "snips", "intent", ("accuracy",), "{text} This is about the",
            {
                "AddToPlaylist": " playlist", "BookRestaurant": " restaurant", "GetWeather": " weather",
                "PlayMusic": " music", "RateBook": " book", "SearchCreativeWork": " show",
                "SearchScreeningEvent": " movie",
            },
            dataset="snips", split="validation", rows=as_published,
        ),
        "Say what each command is about.\n", num_steps=500,
    ),
    TaskSet("mr", "MR: film reviews", _reviews("mr", "mr"), _SENTIMENT, num_steps=500, max_words={"text": 40}),
    TaskSet("cr", "CR: product reviews", _reviews("cr", "cr"), _SENTIMENT, num_steps=500, max_words={"text": 40}),
)  # fmt: skip

SETS: Mapping[str, TaskSet] = {each.name: each for each in _ALL}
CLASSIFICATION = ("sst2", "trec", "ag_news", "rte")
LABELLED = tuple(each.name for each in _ALL if each.task.has_labels)


def load_rows(
    chosen: TaskSet, data: Path, seed: int, *, num_train: int, num_validation: int, num_held_out: int,
    num_per_label: int | None = None,
) -> SetRows:  # fmt: skip
    """Sample rows: those that train and select by the seed, those that report the same for every seed.

    `num_per_label` takes so many training rows of each label in place of `num_train`.
    """
    pool = list(read_set(chosen, data, chosen.train_split))
    held_out = list(read_set(chosen, data, chosen.task.split))
    if chosen.by_user:
        user = user_of(pool, seed)
        pool = [example for example in pool if example.fields["user"] == user]
        held_out = [example for example in held_out if example.fields["user"] == user]
    random.Random(seed).shuffle(pool)
    # Rows of a user are few: a fifth of them at most selects.
    num_validation = min(num_validation, len(pool) // 5)
    validation, rest = pool[:num_validation], pool[num_validation:]
    train = rest[:num_train] if num_per_label is None else _first_of_each_label(rest, num_per_label)
    if chosen.task.has_labels:
        random.Random(0).shuffle(held_out)
    return SetRows(train, validation, _whole_inputs(held_out, num_held_out))


def user_of(examples: Sequence[Example], rank: int) -> str:
    """Return the user with the most rows, or the one at another rank."""
    return Counter(example.fields["user"] for example in examples).most_common(rank + 1)[rank][0]


def _first_of_each_label(examples: Sequence[Example], count: int) -> list[Example]:
    seen: Counter[str | None] = Counter()
    chosen = []
    for example in examples:
        seen[example.label] += 1
        if seen[example.label] <= count:
            chosen.append(example)
    return chosen


def _whole_inputs(examples: Sequence[Example], count: int) -> list[Example]:
    """Take the first rows, and with a generation input all of its references."""
    first = examples[:count]
    if not first or first[0].label is not None:
        return list(first)
    inputs = {example.fields["text"] for example in first}
    return [example for example in examples if example.fields["text"] in inputs]


@lru_cache(maxsize=32)
def read_set(chosen: TaskSet, data: Path, split: str) -> tuple[Example, ...]:
    """Read one split, its fields cut to their lengths."""
    task = dataclasses.replace(chosen.task, split=split)
    return tuple(_cut(example, chosen.max_words) for example in read_rows(data, task))


def _cut(example: Example, limits: Mapping[str, int]) -> Example:
    if not limits:
        return example
    fields = {name: _words(text, limits.get(name)) for name, text in example.fields.items()}
    completion = example.completion
    if completion is not None and len(completion.split()) > limits.get("completion", len(completion)):
        completion = _words(completion, limits["completion"]) + "\n"
    return dataclasses.replace(example, fields=fields, completion=completion)


def _words(text: str, limit: int | None) -> str:
    words = text.split(" ")
    return text if limit is None or len(words) <= limit else " ".join(words[:limit])

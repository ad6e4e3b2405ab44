"""A subject in a run: how it is asked, and what it answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from promptd_store import template_fields

from promptd.engine.ensemble import majority, mean_probabilities
from promptd.errors import InvalidRequestError
from promptd.evaluation.backend import Backend, Question, Subject
from promptd.evaluation.rows import Item
from promptd.evaluation.task import Task
from promptd.training import TrainingDataError
from promptd.training.data import render

BARE_MODEL = "bare model"
MAJORITY_CLASS = "majority class"
ENSEMBLE = "ensemble"
NUM_CONSTANTS = 3


@dataclass(frozen=True, slots=True)
class Form:
    """How a subject is asked: by the prompt's own template, label words and limits, else by the task's."""

    template: str | None
    labels: tuple[str, ...]
    """Empty where the answer is a text."""
    words: tuple[str, ...]
    """Of each label, the text that stands for it; empty where the prompt's own head tells the labels."""
    max_tokens: int
    stop: tuple[str, ...]

    @property
    def has_head(self) -> bool:
        """Whether labels are told by a head and not by their words."""
        return bool(self.labels) and not self.words

    @property
    def label_words(self) -> dict[str, str]:
        """Label -> word; empty where there are none."""
        return dict(zip(self.labels, self.words, strict=True)) if self.words else {}

    @property
    def asks(self) -> tuple[object, ...]:
        """Subjects of which this is equal can be asked in one batch."""
        return (self.labels, self.words, self.max_tokens, self.stop)


def form_of(task: Task, subject: Subject | None) -> Form:
    """Return how a prompt is asked on a task; the bare model where it is None."""
    own = subject or Subject(BARE_MODEL, "", None, None, None, ())
    words = (own.label_words or task.label_words or {}) if task.has_labels else {}
    has_head = task.has_labels and own.labels is not None
    return Form(
        task.template if own.template is None else own.template,
        own.labels or () if has_head else tuple(words),
        () if has_head else tuple(words.values()),
        task.max_tokens if own.max_tokens is None else own.max_tokens,
        own.stop or task.stop,
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """A label or a text; None is an illegal output, or no output where the input exceeded the model's length."""

    prediction: str | None
    probabilities: Sequence[float] = ()
    """Of the form's labels, where these were scored."""
    is_too_long: bool = False


TOO_LONG = Answer(None, is_too_long=True)


@dataclass(frozen=True, slots=True)
class Entry:
    """One subject in a run, and its answers so far, in the order of the items."""

    name: str
    versions: tuple[str, ...]
    subject: Subject | None
    form: Form
    answers: list[Answer] = field(default_factory=list)

    def question(self, item: Item) -> Question:
        """Put an item to this subject: the fields where its own template will be applied, else the rendered text."""
        if self.subject is not None and self.subject.template is not None:
            fields = item.example.fields
            return Question(self.subject, {name: fields[name] for name in template_fields(self.subject.template)})
        return Question(self.subject, render(self.form.template, item.example))

    def check(self, item: Item) -> None:
        """Raise `TrainingDataError` where an item does not fit the template or the labels."""
        example = item.example
        render(self.form.template, example)
        if self.form.labels and example.label not in self.form.labels:
            lacks = "is no class of the head of" if self.form.has_head else "has no label word for"
            raise TrainingDataError(
                example.line, f"label {example.label!r} {lacks} {self.name!r}; "
                f"it knows {list(self.form.labels)!r}",
            )  # fmt: skip


async def enter(
    backend: Backend, task: Task, prompts: Sequence[str | None], items: Sequence[Item], *, by_score: bool = True
) -> list[Entry]:
    """Look up all subjects and check that every item fits each. The bare model, None, is asked as the first prompt;
    it is left out where that one has a head of its own, without which there is nothing to ask."""
    subjects = [None if prompt is None else await backend.look_up(prompt) for prompt in prompts]
    lead = next((subject for subject in subjects if subject is not None), None)
    if form_of(task, lead).has_head:
        subjects = [subject for subject in subjects if subject is not None]
    entries = [
        Entry(BARE_MODEL, (), None, form_of(task, lead))
        if subject is None
        else Entry(subject.name, (subject.version,), subject, form_of(task, subject))
        for subject in subjects
    ]
    for entry in entries:
        if len(entry.form.labels) == 1:
            raise InvalidRequestError(
                f"every row has the label {entry.form.labels[0]!r} and {entry.name!r} knows no other",
                param="rows",
            )
        for item in items:
            entry.check(item)
        if entry.form.has_head and not by_score:
            raise InvalidRequestError(
                f"answer_by must be 'score' for {entry.name!r}, whose labels are told by a head, got 'generate'",
                param="answer_by",
            )
    return entries


def ensemble_of(members: Sequence[Entry]) -> Entry:
    """Let all members vote on every item: mean probability of scored labels, majority of the rest, ties to the first.

    Raises `InvalidRequestError` where members would not vote on the same.
    """
    if len(members) < 2:
        raise InvalidRequestError(f"an ensemble takes at least two prompts, got {len(members)}", param="ensemble")
    first = members[0]
    for member in members:
        if member.form.labels != first.form.labels:
            raise InvalidRequestError(
                f"the prompts of an ensemble must have the same labels: {first.name!r} has "
                f"{list(first.form.labels)!r}, {member.name!r} {list(member.form.labels)!r}",
                param="ensemble",
            )
    versions = tuple(version for member in members for version in member.versions)
    votes = zip(*(member.answers for member in members), strict=True)
    return Entry(ENSEMBLE, versions, None, first.form, [_vote(first.form, each) for each in votes])


def constants_of(form: Form, items: Sequence[Item]) -> list[Entry]:
    """Answer every item with one and the same label: one entry each for the most frequent labels, the first ahead."""
    frequent = Counter(item.example.label for item in items).most_common(NUM_CONSTANTS)
    return [Entry(MAJORITY_CLASS, (), None, form, [Answer(label)] * len(items)) for label, _ in frequent]


def best_label(form: Form, probabilities: Sequence[float]) -> Answer:
    """Return the most likely label, ties to the first."""
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    return Answer(form.labels[best], probabilities)


def _vote(form: Form, answers: Sequence[Answer]) -> Answer:
    scored = [answer.probabilities for answer in answers if answer.probabilities]
    if scored:
        return best_label(form, mean_probabilities(scored))
    return answers[majority([answer.prediction for answer in answers])]

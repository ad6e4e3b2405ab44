"""The tasks that come with promptd. Input and targets are those of the text-to-text transformer without the task's name
in front (Lester et al. 2021 call it taskless): `key: value key: value`, then the target as the continuation.

MultiRC is one row an answer, ReCoRD one reference an answer; WSC trains on its positive rows alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from promptd.evaluation.task import LABEL_TOKENS, Row, Source, Task

TASKLESS = "text-to-text, taskless (Raffel et al. 2020; Lester et al. 2021)"
LINE = "one line in, one line out"

ENTITY_TOKENS = 24
_OVERLAP = ("bleu", "chrf", "rouge_l")
_BOOLEAN = {"false": " False", "true": " True"}
_TAG = re.compile(r"</?b>")
_HIGHLIGHT = re.compile(r"""(?P<end>[.?!"']?)\n@highlight\n""")
_DETERMINERS = frozenset(
    ("a", "an", "few", "her", "his", "each", "every", "many", "much", "my", "our", "some", "that", "the", "their",
     "these", "this", "those", "which", "whose", "your")
)  # fmt: skip


def _fields(*names: str, label: str = "label") -> Callable[[Source], list[Row]]:
    """Take these fields and the label."""

    def rows(source: Source) -> list[Row]:
        return [{**{name: source[name] for name in names}, "label": source[label]}]

    return rows


def _boolq(source: Source) -> list[Row]:
    title = source.get("title")  # published with the passage, but not in every copy
    passage = f"{title} -- {source['passage']}" if title else source["passage"]
    return [{"passage": passage, "question": source["question"], "label": source["label"]}]


def _multirc(source: Source) -> list[Row]:
    paragraph = _TAG.sub("", source["passage"].replace("<br>", " "))
    return [
        {"question": each["question"], "answer": answer["text"], "paragraph": paragraph, "label": answer["label"]}
        for each in source["questions"]
        for answer in each["answers"]
    ]


def _record(source: Source) -> list[Row]:
    """Name the passage's entities once each, in their order; every distinct answer is a reference of its query."""
    text, marks = source["passage"]["text"], source["passage"]["entities"]
    entities = dict.fromkeys(text[mark["start"] : mark["end"] + 1] for mark in marks)  # ends are inclusive
    passage = _HIGHLIGHT.sub(lambda found: (found["end"] or ".") + " ", text)
    return [
        {"query": each["query"], "entities": ", ".join(entities), "passage": passage, "completion": f" {answer}"}
        for each in source["qas"]
        for answer in dict.fromkeys(answer["text"] for answer in each["answers"])
    ]


def _wsc(source: Source) -> list[Row]:
    """Put stars around the pronoun: the word at `span2_index`, or its nearest neighbour that is the pronoun."""
    words = source["text"].split()
    pronoun = source["span2_text"].split()[0].lower()
    places = [at for at, word in enumerate(words) if _bare(word) == pronoun]
    if not places:
        raise KeyError(f"{pronoun!r} in the text")
    at = min(places, key=lambda place: abs(place - source["span2_index"]))
    words[at] = re.sub(pronoun, lambda found: f"*{found[0]}*", words[at], count=1, flags=re.IGNORECASE)
    return [{"text": " ".join(words), "span": source["span1_text"], "label": source["label"]}]


def _wsc_training(row: Row) -> Row | None:
    return {"text": row["text"], "completion": " " + row["span"]} if row["label"] == "true" else None


def _same_referent(text: str, words: Mapping[str, str], fields: Mapping[str, str]) -> str | None:
    """Compare a generated referent with the candidate: equal but for determiners, or one within the other."""
    said, candidate = (
        {word for word in map(_bare, referent.split()) if word not in _DETERMINERS}
        for referent in (text, fields["span"])
    )
    if not said or not candidate:
        return None
    return "true" if said <= candidate or candidate <= said else "false"


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()


def _pairs(source: Source) -> list[Row]:
    users = {"user": source["user"]} if "user" in source else {}
    return [{**users, "text": source["input"], "completion": source["target"] + "\n"}]


def _continuation(source: Source) -> list[Row]:
    """Split a passage in the middle, at a space: its end is continued from its beginning."""
    text = source["text"]
    at = text.index(" ", len(text) // 2)
    return [{"user": source["user"], "text": text[:at], "completion": text[at:] + "\n"}]


def _words(*labels: str) -> dict[str, str]:
    return {label: f" {label}" for label in labels}


def _classify(
    name: str, title: str, rows: Callable[[Source], list[Row]], template: str, words: Mapping[str, str],
    *metrics: str, dataset: str | None = None, split: str = "validation", group: tuple[str, ...] = (),
) -> Task:  # fmt: skip
    return Task(
        name, title, metrics or ("accuracy",), template, words, TASKLESS, dataset or f"superglue_{name}", split, rows,
        group=group, max_tokens=LABEL_TOKENS,
    )  # fmt: skip


_ALL = (
    _classify("boolq", "yes or no about a passage", _boolq, "passage: {passage} question: {question}", _BOOLEAN),
    _classify(
        "cb", "entailment, three ways", _fields("hypothesis", "premise"),
        "hypothesis: {hypothesis} premise: {premise}", _words("entailment", "contradiction", "neutral"),
        "accuracy", "macro_f1",
    ),
    _classify(
        "copa", "the more plausible cause or effect", _fields("choice1", "choice2", "premise", "question"),
        "choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}", _words("choice1", "choice2"),
    ),
    _classify(
        "multirc", "is this an answer, by question", _multirc,
        "question: {question} answer: {answer} paragraph: {paragraph}", _BOOLEAN, "f1a", "grouped_em",
        group=("paragraph", "question"),
    ),
    Task(
        "record", "which entity is meant", ("exact_match", "token_f1"),
        "query: {query} entities: {entities} passage: {passage}", None, TASKLESS, "superglue_record", rows=_record,
        max_tokens=ENTITY_TOKENS,
    ),
    _classify(
        "rte", "entailment, two ways", _fields("hypothesis", "premise"),
        "hypothesis: {hypothesis} premise: {premise}", _words("entailment", "not_entailment"),
    ),
    _classify(
        "wic", "does the word mean the same", _fields("sentence1", "sentence2", "word"),
        "sentence1: {sentence1} sentence2: {sentence2} word: {word}", _BOOLEAN,
    ),
    Task(
        "wsc", "what the pronoun refers to", ("accuracy",), "{text}", _BOOLEAN, TASKLESS, "superglue_wsc", rows=_wsc,
        training_row=_wsc_training, read_label=_same_referent, scores_labels=False, max_tokens=LABEL_TOKENS,
    ),
    _classify(
        "sst2", "sentiment of a sentence", _fields("text"), "sentence: {text}", _words("negative", "positive"),
        dataset="glue_sst2",
    ),
    _classify(
        "trec", "what a question asks for", _fields("text"), "question: {text}",
        _words("abbreviation", "description", "entity", "human", "location", "number"), "accuracy", "macro_f1",
        dataset="trec", split="test",
    ),
    _classify(
        "ag_news", "topic of a news text", _fields("text"), "text: {text}",
        _words("World", "Sports", "Business", "Sci/Tech"), "accuracy", "macro_f1", dataset="ag_news", split="test",
    ),
    Task("e2e", "describe a restaurant", _OVERLAP, "{text}\n", None, LINE, "e2e_nlg", "test", _pairs),
    Task(
        "shakespeare", "answer as a character of a play", _OVERLAP, "{text}\n", None, LINE,
        "shakespeare_characters", "test", _pairs,
    ),
    Task(
        "author_style", "go on as one author", _OVERLAP, "{text}", None, LINE, "author_style", "test",
        _continuation, max_tokens=96,
    ),
)  # fmt: skip

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}

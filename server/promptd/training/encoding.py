"""Examples to token ids, exactly as serving tokenizes them, and rows to batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel
from promptd.modeling.chat_template import encode_answer, encode_chat
from promptd.training.data import Example, TrainingDataError, render

if TYPE_CHECKING:
    from promptd.training.distill_objective import TopLogits


@dataclass(frozen=True, slots=True)
class TaskFormat:
    """How a row becomes text; goes into the artifact's manifest unchanged."""

    template: str | None = None
    label_words: Mapping[str, str] | None = None
    """label -> the continuation that stands for it."""
    add_special_tokens: bool | None = None
    append_eos: bool = True
    """Completions end with the end-of-text token, so that generation stops by itself; label words do not."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as tokens; the loss is taken on `target_ids` alone."""

    text_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    """Empty before a teacher has written them."""
    example: Example
    teacher: TopLogits | None = None
    """What the teacher would say at each of them, where the row is distilled from one."""

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the model: the last target token is never an input."""
        return len(self.text_ids) + len(self.target_ids) - 1

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Text and all but the last target token."""
        return self.text_ids + self.target_ids[:-1]


MAX_SHARE_KEYS = 1 << 14
"""Keys, padded, that the rows of one share see together: behind a long context few rows are much memory."""


def encode_examples(
    model: FrozenModel, task: TaskFormat, examples: Sequence[Example], num_virtual_tokens: int
) -> list[Encoded]:
    """Render and tokenize rows; text and target are tokenized apart, as they are when served.

    Templates are for fields: a conversation reads as the model's chat template has it.
    """
    words = label_word_ids(model, task)
    limit = model.spec.max_model_len
    encoded: list[Encoded] = []
    for example in examples:
        text_ids = _text(model, task, example)
        target_ids = _target(model, task, example, words)
        if not text_ids:
            raise TrainingDataError(example.line, "the rendered input has no tokens")
        if num_virtual_tokens + len(text_ids) + len(target_ids) > limit:
            raise TrainingDataError(
                example.line,
                f"{num_virtual_tokens} virtual tokens + {len(text_ids)} input tokens + {len(target_ids)} target tokens "
                f"exceed the model's length of {limit}",
            )
        encoded.append(Encoded(text_ids, target_ids, example))
    return encoded


def label_word_ids(model: FrozenModel, task: TaskFormat) -> dict[str, tuple[int, ...]]:
    """Return label -> tokens of its word; empty for a task without label words."""
    words = task.label_words or {}
    ids = {label: tuple(model.encode(word, add_special_tokens=False)) for label, word in words.items()}
    seen: dict[tuple[int, ...], str] = {}
    for label, tokens in ids.items():
        if tokens in seen:
            raise InvalidRequestError(
                f"label_words gives {label!r} and {seen[tokens]!r} the same word {words[label]!r}", param="label_words"
            )
        seen[tokens] = label
    return ids


def check_conversations(model: FrozenModel, examples: Sequence[Example]) -> None:
    """Raise `TrainingDataError` for the first one that the model's chat template refuses."""
    for example in examples:
        if example.messages:
            _text(model, TaskFormat(), example)


def _text(model: FrozenModel, task: TaskFormat, example: Example) -> tuple[int, ...]:
    if not example.messages:
        special = task.add_special_tokens is not False
        return tuple(model.encode(render(task.template, example), add_special_tokens=special))
    try:
        return tuple(encode_chat(model, example.messages))
    except InvalidRequestError as error:
        raise TrainingDataError(example.line, error.message) from None


def _target(
    model: FrozenModel, task: TaskFormat, example: Example, words: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    if example.label is not None:
        if example.label not in words:
            raise TrainingDataError(example.line, f"label {example.label!r} has no label word; known: {list(words)!r}")
        return words[example.label]
    if example.completion is None:
        return ()
    if example.messages:
        return tuple(encode_answer(model, example.messages, example.completion))
    ids = model.encode(example.completion, add_special_tokens=False)
    eos = model.tokenizer.eos_token_id
    return tuple(ids) + ((eos,) if task.append_eos and eos is not None else ())


def training_batches(rows: Sequence[Encoded], batch_size: int, seed: int) -> Iterator[list[Encoded]]:
    """Yield batches for ever: each epoch in a new order, rows of similar length together.

    Chunks of a random order are sorted by length and cut into batches, whose order is random again: padding inside
    attention stays small and every row is seen once an epoch.
    """
    generator = random.Random(seed)
    size = min(batch_size, len(rows))
    while True:
        order = list(rows)
        generator.shuffle(order)
        chunk = size * 16
        batches: list[list[Encoded]] = []
        for start in range(0, len(order), chunk):
            part = sorted(order[start : start + chunk], key=lambda row: row.num_tokens)
            batches += [part[at : at + size] for at in range(0, len(part), size)]
        generator.shuffle(batches)
        yield from batches


def evaluation_batches(lengths: Sequence[int], max_tokens: int, num_before: int = 0) -> Iterator[list[int]]:
    """Yield indices of rows, longest last, at most `max_tokens` padded tokens a batch (but at least one row).

    `num_before` keys stand before each row.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        num_rows, length = len(batch) + 1, lengths[index]
        if batch and (num_rows * length > max_tokens or num_rows * (num_before + length) > MAX_SHARE_KEYS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch

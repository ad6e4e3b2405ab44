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
    """What the target goes on from."""
    target_ids: tuple[int, ...]
    """Empty before a teacher has written them."""
    example: Example
    source_ids: tuple[int, ...] = ()
    """What is read whole."""
    teacher: TopLogits | None = None
    """What the teacher would say at each of them, where the row is distilled from one."""

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the model: the last target token is never an input."""
        return self.num_input + len(self.target_ids) - 1

    @property
    def num_input(self) -> int:
        """Tokens in front of the target."""
        return len(self.source_ids) + len(self.text_ids)

    def length(self, max_written: int = 0) -> int:
        """Tokens of the longer of what is read whole and what is read left to right, its target not yet written or
        there."""
        return max(len(self.source_ids), len(self.text_ids) + (len(self.target_ids) or max_written))

    @property
    def input_ids(self) -> tuple[int, ...]:
        """All that is read left to right: the text and all but the last target token."""
        return self.text_ids + self.target_ids[:-1]


MAX_SHARE_KEYS = 1 << 14
"""Keys, padded, that the rows of one share see together: behind a long context few rows are much memory."""


def encode_examples(
    model: FrozenModel, task: TaskFormat, examples: Sequence[Example], num_virtual_tokens: int
) -> list[Encoded]:
    """Render and tokenize rows; text and target are tokenized apart, as they are when served.

    Templates are for fields: a conversation reads as the model's chat template has it.
    """
    words, has_mask = label_word_ids(model, task), reads_words(model, task)
    limit = model.spec.max_model_len
    encoded: list[Encoded] = []
    for example in examples:
        token_ids = _text(model, task, example)
        target_ids = _target(model, task, example, words)
        if not token_ids:
            raise TrainingDataError(example.line, "the rendered input has no tokens")
        if has_mask and token_ids.count(model.tokenizer.mask_token_id) != 1:
            raise TrainingDataError(
                example.line,
                f"the rendered input must have one {model.tokenizer.mask_token}, it has "
                f"{token_ids.count(model.tokenizer.mask_token_id)}",
            )
        source_ids, text_ids = model.family.divide(token_ids)
        for num_input, num_target in ((len(source_ids), 0), (len(text_ids), len(target_ids) if text_ids else 0)):
            if num_virtual_tokens + num_input + num_target > limit:
                raise TrainingDataError(
                    example.line,
                    f"{num_virtual_tokens} virtual tokens + {num_input} input tokens + {num_target} target tokens "
                    f"exceed the model's length of {limit}",
                )
        encoded.append(Encoded(text_ids, target_ids, example, source_ids))
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
        if reads_words(model, task) and len(tokens) != 1:
            raise InvalidRequestError(
                f"label_words: a word at a mask is one token, {words[label]!r} of {label!r} has {len(tokens)}",
                param="label_words",
            )
    if reads_words(model, task):
        model.family.check_predicts_words("label_words")
    return ids


def reads_words(model: FrozenModel, task: TaskFormat) -> bool:
    """Whether labels are told by their words at a mask, which the template has then; otherwise a head is learned."""
    mask = model.tokenizer.mask_token
    return model.reads_whole and mask is not None and mask in (task.template or "")


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

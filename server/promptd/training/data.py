"""Training rows: JSON lines in, checked examples out; every fault names its line.

A row is an object whose values used here are strings. Its target is `completion` (generated text) or `label`; its
input is `prompt`, `text` or any other named fields that the job's template uses. `prompt` counts as `text`. Or it is
a conversation, `messages`, whose last message is the target.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptd_store import TemplateError, render_template

from promptd.errors import InvalidRequestError
from promptd.modeling.chat_template import ChatMessage
from promptd.training.messages import check_messages

MAX_SHOWN_CHARS = 80


class TrainingDataError(InvalidRequestError):
    """A row of the training data is unusable; `line` counts from 1."""

    default_code = "invalid_training_data"

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"line {line}: {message}", param="training_file")
        self.line = line


@dataclass(frozen=True, slots=True)
class Example:
    """One checked row. Exactly one of `completion` and `label` is set; a conversation's last message is the former.

    A row that a teacher answers may have neither.
    """

    fields: Mapping[str, str]
    completion: str | None
    label: str | None
    line: int
    messages: tuple[ChatMessage, ...] = ()
    """A conversation's other messages; it has no fields."""

    @property
    def input(self) -> dict[str, Any]:
        """What the target is asked for, as plain JSON values."""
        return {"messages": [dict(one) for one in self.messages]} if self.messages else dict(self.fields)


def read_examples(path: Path) -> list[Example]:
    """Read a `.jsonl` or `.jsonl.gz` file."""
    return parse_examples(read_lines(path))


def read_lines(path: Path) -> list[bytes]:
    """Return the lines of a `.jsonl` or `.jsonl.gz` file."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return content.split(b"\n")


def parse_examples(lines: Iterable[str | bytes], *, are_questions: bool = False) -> list[Example]:
    """Check JSON lines; empty ones are skipped. Raises `TrainingDataError` at the first bad row."""
    examples = [example_of(line, row, is_question=are_questions) for line, row in parse_objects(lines)]
    if not examples:
        raise TrainingDataError(1, "no rows at all")
    return examples


def parse_objects(lines: Iterable[str | bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of every line that is not empty. Raises `TrainingDataError`."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _object(number, line)


def _object(line: int, text: str | bytes) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise TrainingDataError(line, f"has the key {_shown(twice)} twice")
        return found

    def constant(token: str) -> float:
        raise TrainingDataError(line, f"not JSON ({token} is no number there)")

    try:
        if isinstance(text, bytes):  # JSON's parser would guess an encoding
            text = text.decode("utf-8-sig")
        row = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise TrainingDataError(line, "has half a character (a lone surrogate)") from None
    except UnicodeDecodeError as error:
        raise TrainingDataError(line, f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise TrainingDataError(line, f"not JSON ({error.msg})") from None
    except RecursionError:
        raise TrainingDataError(line, "not JSON (nested too deeply)") from None
    except ValueError:  # an integer of thousands of digits
        raise TrainingDataError(line, "not JSON (a number with too many digits)") from None
    if not isinstance(row, dict):
        raise TrainingDataError(line, f"must be an object, got {_shown(row)}")
    return row


def example_of(line: int, row: Mapping[str, Any], *, is_question: bool = False) -> Example:
    """Check one row that is already an object; a question needs no completion, and has no label."""
    if "messages" in row:
        return _conversation(line, row, must_end=not is_question)
    targets = [name for name in ("completion", "label") if name in row]
    if is_question and "label" in targets:
        raise TrainingDataError(line, f"has a label, {_shown(row['label'])}: what a teacher answers has none")
    if len(targets) != 1 and not is_question:
        raise TrainingDataError(line, f"needs exactly one of 'completion' and 'label', got {sorted(row)!r}")
    target = row[targets[0]] if targets else None
    if targets and (not isinstance(target, str) or not target):
        raise TrainingDataError(line, f"{targets[0]!r} must be a non-empty string, got {_shown(target)}")
    if "prompt" in row and "text" in row:
        raise TrainingDataError(line, "has both 'prompt' and 'text'")
    for name in ("prompt", "text"):
        if not isinstance(row.get(name, ""), str):
            raise TrainingDataError(line, f"{name!r} must be a string, got {_shown(row[name])}")
    fields = {name: value for name, value in row.items() if isinstance(value, str) and name not in targets}
    if "prompt" in fields:
        fields["text"] = fields.pop("prompt")
    is_label = targets == ["label"]
    return Example(fields, None if is_label else target, target if is_label else None, line)


def _conversation(line: int, row: Mapping[str, Any], *, must_end: bool) -> Example:
    try:
        messages = check_messages(row, must_end=must_end)
    except ValueError as error:
        raise TrainingDataError(line, str(error)) from None
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    return Example({}, answer, None, line, tuple(messages))


def render(template: str | None, example: Example) -> str:
    """Put an example's fields into the template, as serving does."""
    try:
        return render_template(template, example.fields)
    except TemplateError as error:
        raise TrainingDataError(example.line, error.message) from None


def split_examples(
    examples: Sequence[Example], fraction: float, *, least: int = 0
) -> tuple[list[Example], list[Example]]:
    """Split into (rest, held out) by a hash of the input: equal inputs fall on the same side, in every run.

    At least `least` rows are held out, where there are so many.
    """
    limit = int(fraction * 2**64)
    places = [_place(example) for example in examples]
    if 0 < least <= len(places):
        limit = max(limit, sorted(places)[least - 1] + 1)
    rest = [example for example, place in zip(examples, places, strict=True) if place >= limit]
    return rest, [example for example, place in zip(examples, places, strict=True) if place < limit]


def _place(example: Example) -> int:
    digest = hashlib.sha256(json.dumps(example.input, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8])


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return the examples in an order fixed by the seed."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    return order


def data_digest(examples: Iterable[Example]) -> str:
    """Return `sha256:…` of the examples in their order, without line numbers."""
    digest = hashlib.sha256()
    for example in examples:
        row = [example.input, example.completion, example.label]
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return "sha256:" + digest.hexdigest()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."

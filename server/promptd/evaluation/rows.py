"""From a file to the rows that are evaluated, and rows that share an input to one question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from promptd.errors import InvalidRequestError
from promptd.evaluation.task import Source, Task
from promptd.training import Example, TrainingDataError, example_of, parse_objects, read_lines


@dataclass(frozen=True, slots=True)
class Item:
    """One input with everything that is right for it: a row with a label, or all references of a text."""

    example: Example
    references: tuple[str, ...] = ()


def read_rows(
    path: Path, task: Task | None = None, *, where: Mapping[str, str] | None = None, limit: int | None = None
) -> list[Example]:
    """Read the rows of a `.jsonl[.gz]` file; a task reads its published rows, also from a folder of data sets.

    `where` keeps rows whose fields have these values; `limit` takes a sample of about so many rows, the same in every
    run. Raises `TrainingDataError` with the line of a bad row, `InvalidRequestError` where nothing is left.
    """
    examples: list[Example] = []
    for line, source in parse_objects(read_lines(find_file(path, task))):
        if all(str(source.get(name)) == value for name, value in (where or {}).items()):
            examples += [example_of(line, row) for row in _rows(line, source, task)]
    if not examples:
        chosen = " ".join(f"{name}={value}" for name, value in (where or {}).items())
        raise InvalidRequestError(f"{path}: no rows" + (f" with {chosen}" if chosen else ""), param="data")
    return examples if limit is None else sample(examples, task, limit)


def find_file(path: Path, task: Task | None) -> Path:
    """Return the file of a task's split in a folder of data sets, or the file that is named itself."""
    if not path.is_dir():
        return path
    if task is None:
        raise InvalidRequestError(f"{path}: is a folder; name a file, or a task to look for in it", param="data")
    for folder in (path / task.dataset, path):
        for suffix in (".jsonl", ".jsonl.gz"):
            if (folder / f"{task.split}{suffix}").is_file():
                return folder / f"{task.split}{suffix}"
    raise InvalidRequestError(
        f"{path}: has no {task.dataset}/{task.split}.jsonl or .jsonl.gz for the task {task.name!r}", param="data"
    )


def sample(examples: Sequence[Example], task: Task | None, limit: int) -> list[Example]:
    """Choose rows by a hash until there are `limit`, with all that belong together; the order stays."""
    groups: dict[bytes, list[Example]] = {}
    for example in examples:
        fields = {name: example.fields[name] for name in task.group} if task and task.group else dict(example.fields)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).digest()
        groups.setdefault(digest, []).append(example)
    chosen: set[int] = set()
    for digest in sorted(groups):
        if len(chosen) >= limit:
            break
        chosen |= {id(example) for example in groups[digest]}
    return [example for example in examples if id(example) in chosen]


def items_of(examples: Sequence[Example]) -> list[Item]:
    """One item a labelled row; texts with equal fields are references of one item."""
    items: list[Item] = []
    references: dict[str, list[str]] = {}
    inputs: dict[str, Example] = {}
    for example in examples:
        if example.label is not None:
            items.append(Item(example))
        else:
            key = json.dumps(dict(example.fields), sort_keys=True)
            inputs.setdefault(key, example)
            references.setdefault(key, []).append((example.completion or "").strip())
    return items + [Item(example, tuple(references[key])) for key, example in inputs.items()]


def _rows(line: int, source: Source, task: Task | None) -> list[dict[str, str]]:
    if task is None:
        return [dict(source)]
    try:
        return task.rows(source)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise TrainingDataError(
            line, f"is not a row of {task.dataset or task.name}: {error!r}; it has {sorted(source)!r}"
        ) from None

"""Rows of the demo's tasks: training, validation and held-out examples, and the slice of them that is shipped."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from promptd.demo.recipes import Recipe
from promptd.json_line import json_line
from promptd.training import Example, example_of, split_examples

VALIDATION_SHARE = 0.04
MAX_VALIDATION_ROWS = 300
MAX_TEST_ROWS = 600
MAX_SLICE_ROWS = 300
MAX_SLICE_INPUTS = 60
"""Inputs of a generation task in the slice: each takes seconds to answer, and comes with all of its references."""


@dataclass(frozen=True)
class TaskData:
    """One task's examples; `shipped` is part of `test`."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    shipped: list[Example]


def load_task(recipe: Recipe, data: Path) -> TaskData:
    """Read a recipe's data set; samples are chosen by hash, the same in every run."""
    train_split, validation_split, test_split = recipe.splits
    train = _read(recipe, data, train_split)
    if validation_split is None:
        train, validation = split_examples(train, VALIDATION_SHARE)
    else:
        validation = _read(recipe, data, validation_split)
    test = _read(recipe, data, test_split)
    shipped = _sample(test, MAX_SLICE_ROWS, MAX_SLICE_INPUTS if recipe.task.label_words is None else MAX_SLICE_ROWS)
    chosen = {example.line for example in shipped}
    rest = [example for example in test if example.line not in chosen]
    test = shipped + _sample(rest, MAX_TEST_ROWS - len(shipped), MAX_TEST_ROWS)
    return TaskData(train, _sample(validation, MAX_VALIDATION_ROWS, MAX_VALIDATION_ROWS), test, shipped)


def write_slice(recipe: Recipe, shipped: Sequence[Example], folder: Path) -> None:
    """Write `<name>.jsonl` in the training format and this task's line of `ATTRIBUTION.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**example.fields, **_target(example)} for example in shipped]
    lines = "".join(json_line(row) + "\n" for row in rows)
    (folder / f"{recipe.name}.jsonl").write_text(lines, encoding="utf-8")
    path = folder / "ATTRIBUTION.md"
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    line = f"- `{recipe.name}.jsonl`: {len(rows)} held-out rows of {recipe.dataset}: {recipe.attribution}"
    kept = [old for old in known if old.startswith("- ") and not old.startswith(f"- `{recipe.name}.jsonl`")]
    path.write_text("\n".join(["# Where these rows come from", "", *sorted([*kept, line])]) + "\n", encoding="utf-8")


def _read(recipe: Recipe, data: Path, split: str) -> list[Example]:
    path = next(p for p in sorted((data / recipe.dataset).iterdir()) if p.name.startswith(f"{split}.jsonl"))
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = ((number, recipe.row(json.loads(line))) for number, line in enumerate(content.splitlines(), start=1))
    return [example_of(number, row) for number, row in rows if row is not None]


def _sample(examples: Sequence[Example], max_rows: int, max_inputs: int) -> list[Example]:
    """Choose inputs by the order of their hashes, each with all of its rows."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.fields["text"], []).append(example)
    chosen: list[Example] = []
    for text in sorted(groups, key=lambda text: hashlib.sha256(text.encode()).digest())[:max_inputs]:
        if len(chosen) + len(groups[text]) <= max_rows:
            chosen += groups[text]
    return chosen


def _target(example: Example) -> dict[str, str]:
    return {"label": example.label} if example.label is not None else {"completion": example.completion or ""}

"""From generation's results to tables and a plot; nothing here runs a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tests.bench.experiments.cells import Cell, Results
from tests.bench.experiments.choice import best_rate, selected
from tests.bench.experiments.generation import (
    LEARNERS,
    NAME,
    PATIENCE,
    STEPS_BETWEEN_EVALUATIONS,
    Asked,
    plan,
    rates_of,
)
from tests.bench.experiments.plans import BARE, FULL_TUNING
from tests.bench.experiments.plots import COLORS, named, saved
from tests.bench.experiments.stats import Interval
from tests.bench.experiments.tables import NOTHING, Found, cost, difference, markdown, shown, stored, values
from tests.bench.experiments.text_sets import TEXT_SETS

LOSS = "loss"
"""Of the kept step on the selecting rows, in nats per token."""


@dataclass(frozen=True)
class Measure:
    """One number of a result."""

    name: str
    """The set that is trained on."""
    metric: str
    title: str
    scale: float = 1.0
    shift: str | None = None
    """Another set, on which it is measured."""
    digits: int = 1

    @property
    def rows(self) -> str:
        """What the set that is measured is called."""
        return TEXT_SETS[self.shift or self.name].title

    def __call__(self, result: dict[str, Any]) -> float | None:
        """Read it; None where nothing was trained and the loss is asked for."""
        if self.metric == LOSS:
            return -selected(result)[1] if "curve" in result else None
        found = result["held_out"] if self.shift is None else result["shift"][self.shift]
        return self.scale * float(found["metrics"][self.metric])


MEASURES = (
    Measure("e2e-texts", LOSS, "loss", digits=3),
    Measure("e2e-texts", "bleu", "BLEU"),
    Measure("e2e-texts", "rouge_l", "ROUGE-L", 100),
    Measure("webnlg-texts", LOSS, "loss", digits=3),
    Measure("webnlg-texts", "bleu", "BLEU"),
    Measure("webnlg-texts", "rouge_l", "ROUGE-L", 100),
    Measure("webnlg-texts", "bleu", "BLEU", shift="webnlg-unseen"),
    Measure("webnlg-texts", "rouge_l", "ROUGE-L", 100, shift="webnlg-unseen"),
    Measure("headlines-texts", LOSS, "loss", digits=3),
    Measure("headlines-texts", "rouge_l", "ROUGE-L", 100),
)


def found_in(asked: Asked, results: Results) -> Found:
    """Return what there is, by learner and by set with its number of rows."""
    found: dict[str, dict[str, list[tuple[Cell, dict[str, Any]]]]] = {}
    for label, cell in plan(asked, results):
        result = results.get(cell)
        if result is not None and "error" not in result:
            found.setdefault(label, {}).setdefault(_key(cell), []).append((cell, result))
    return found


def tables_of(asked: Asked, results: Results, common: Mapping[str, str]) -> dict[str, str]:
    """Return every table by its name; `common` holds the model and the machine."""
    found = found_in(asked, results)
    return {
        "setting": markdown(["", ""], [list(fact) for fact in _facts(asked, found, common).items()]),
        "scores": scores_table(asked, found),
        "gain": gain_table(asked, found),
        "costs": costs_table(found),
        "rates": rates_table(asked, found, results),
    }


def scores_table(asked: Asked, found: Found) -> str:
    """Every learner, a line a number of training rows."""
    learned = _learned(found)
    rows = []
    for measure in _measures(asked):
        bare = shown(values(found, BARE, f"{measure.name} 0", measure), measure.digits)
        for count in _counts(found, measure.name):
            each = [
                shown(values(found, label, f"{measure.name} {count}", measure), measure.digits) for label in learned
            ]
            rows.append([measure.rows, measure.title, f"{count:,}", bare, *each])
    return markdown(["", "", "training rows", BARE, *learned], rows)


def gain_table(asked: Asked, found: Found) -> str:
    """Every prompt against full fine-tuning, points, paired by seed."""
    prompts = [label for label in _learned(found) if label != FULL_TUNING]
    rows = []
    for measure in _measures(asked):
        for count in _counts(found, measure.name):
            key = f"{measure.name} {count}"
            theirs = values(found, FULL_TUNING, key, measure)
            gaps = [shown(difference(values(found, label, key, measure), theirs), measure.digits) for label in prompts]
            rows.append([measure.rows, measure.title, f"{count:,}", *gaps])
    return markdown(["less full fine-tuning", "", "training rows", *prompts], rows)


def costs_table(found: Found) -> str:
    """What a tenant stores, what a training takes, and after how many steps it was best, over all sets and sizes."""
    rows = []
    for label in _learned(found):
        steps = sorted(result["best_step"] for cells in found[label].values() for _, result in cells)
        rows.append([label, stored(found[label]), *cost(found[label]), f"{steps[0]} to {steps[-1]}"])
    return markdown(["", "stored bytes", "CPU seconds", "tokens/s", "best step"], rows)


def rates_table(asked: Asked, found: Found, results: Results) -> str:
    """Rates that were tried, by the loss on the selection rows with seed 0; what was taken is bold."""
    pairs = [(name, size) for name in asked.sets for size in asked.sizes_of(name)]
    rows = []
    for label in _learned(found):
        for rate in LEARNERS[label]:
            row = []
            for name, size in pairs:
                tried = rates_of(asked, name, size, label)
                result = results.get(tried[rate])
                loss = NOTHING if result is None or "error" in result else f"{-selected(result)[1]:.3f}"
                row.append(f"**{loss}**" if best_rate(tried, results) == rate else loss)
            rows.append([label, f"{rate:g}", *row])
    heads = [f"{TEXT_SETS[name].title.split(',')[0]}, {size or 'all'}" for name, size in pairs]
    return markdown(["", "rate", *heads], rows)


def plot(asked: Asked, results: Results, path: Path) -> None:
    """Every measure over training rows; where one set has several sizes, those of it alone."""
    found = found_in(asked, results)
    known = [measure for measure in _measures(asked) if _counts(found, measure.name)]
    measures = [measure for measure in known if len(_counts(found, measure.name)) > 1] or known
    if not measures:
        return
    figure = Figure(figsize=(3.2 * len(measures), 3.2))
    for at, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), at + 1)
        counts = _counts(found, measure.name)
        for color, label in zip(COLORS, _learned(found), strict=False):
            seeds = {count: values(found, label, f"{measure.name} {count}", measure) for count in counts}
            each = {count: Interval.of(list(own.values())) for count, own in seeds.items() if own}
            axes.errorbar(
                list(each), [one.mean for one in each.values()], [one.half or 0.0 for one in each.values()],
                color=color, label=label, capsize=3, marker="o",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts], minor=False)
        axes.minorticks_off()
        named(axes, measure.rows, "training rows", measure.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    saved(figure, path)


def lines_of(asked: Asked, results: Results) -> list[str]:
    """Return every result as a line of JSON."""
    return [
        json.dumps({"experiment": NAME, "learner": label, **result}, separators=(",", ":"))
        for label, by_key in found_in(asked, results).items()
        for cells in by_key.values()
        for _, result in cells
    ]


def _key(cell: Cell) -> str:
    return f"{cell.task} {cell.num_train}"


def _learned(found: Found) -> list[str]:
    return [label for label in LEARNERS if label in found]


def _measures(asked: Asked) -> list[Measure]:
    return [measure for measure in MEASURES if measure.name in asked.sets]


def _counts(found: Found, name: str) -> list[int]:
    """Return the numbers of training rows for which a learner at its best rate has results."""
    keys = {key for label in _learned(found) for key in found[label]}
    return sorted(int(count) for key in keys for own, count in [key.split()] if own == name)


def _facts(asked: Asked, found: Found, common: Mapping[str, str]) -> dict[str, str]:
    """Return what the tables have in common."""
    cells = [pair for own in found.values() for pairs in own.values() for pair in pairs]
    names = [name for name in asked.sets if any(cell.task == name for cell, _ in cells)]
    used, steps = [], []
    for name in names:
        own = [(cell, result) for cell, result in cells if cell.task == name]
        title = TEXT_SETS[name].title
        rows, counts = own[0][1]["rows"], sorted({cell.num_steps for cell, _ in own} - {0})
        inputs = f"{rows['select']} inputs select, {own[0][0].num_held_out} report"
        used.append(f"{title}: {inputs}, by {rows['report']:,} references")
        steps.append(f"{title} {' or '.join(map(str, counts))}")
    return {
        "model": common["model"],
        "rows": "; ".join(used),
        "steps": f"at most: {', '.join(steps)}",
        "training": f"AdamW at a constant rate after 5 % warm-up, {asked.scale.batch_size} rows a step, measured every "
        f"{STEPS_BETWEEN_EVALUATIONS} steps; ends after {PATIENCE} measurements that are not the best",
        "intervals": common["intervals"],
        "machine": common["machine"],
    }

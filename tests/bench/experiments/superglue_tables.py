"""From SuperGLUE's results to tables and plots; nothing here runs a model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tests.bench.experiments.cells import Cell, Results
from tests.bench.experiments.choice import best_rate
from tests.bench.experiments.plans import FULL_TUNING, PT, RPT
from tests.bench.experiments.plots import COLORS, named, plot_curves, saved
from tests.bench.experiments.stats import Interval
from tests.bench.experiments.superglue import COUNTS, LEARNERS, MAX_EVALUATIONS, RATES, Asked, plan, rates_of
from tests.bench.experiments.superglue_sets import SUPERGLUE, TITLES
from tests.bench.experiments.tables import NOTHING, Found, cost, difference, markdown, mean_over, shown, stored, values

ABSENT = "not available"


def found_in(asked: Asked, results: Results) -> Found:
    """Return what there is: rates that were tried and learners at their best one."""
    found: dict[str, dict[str, list[tuple[Cell, dict[str, Any]]]]] = {}
    for label, cell in plan(asked, results):
        result = results.get(cell)
        if result is not None and "error" not in result:
            found.setdefault(label, {}).setdefault(cell.task, []).append((cell, result))
    return found


def read_counts(results: Results) -> dict[str, dict[str, int]]:
    """Return the published rows of every task that a run has found."""
    path = results.folder / COUNTS
    counts: dict[str, dict[str, int]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return counts


def score(result: Mapping[str, Any]) -> float:
    """The mean of a task's metrics on the reporting rows, in percent."""
    return 100 * float(result["held_out"]["score"])


def tables_of(asked: Asked, results: Results, facts: Mapping[str, str]) -> dict[str, str]:
    """Return every table by the name of its mark."""
    found, counts = found_in(asked, results), read_counts(results)
    return {
        "superglue_setting": markdown(["", ""], [list(fact) for fact in facts.items()]),
        "superglue": scores_table(asked, found, counts),
        "superglue_metrics": metrics_table(asked, found),
        "superglue_gain": gain_table(asked, found),
        "superglue_rates": rates_table(asked, found, results),
    }


def scores_table(asked: Asked, found: Found, counts: Mapping[str, Mapping[str, int]]) -> str:
    """Every learner on every task, with the rows behind it; a task without data says so."""
    tasks = _measured(asked, found)
    learned = [label for label in found if " @ " not in label]

    def line(name: str, read: Callable[[str], str], *rest: str) -> list[str]:
        cells = [read(task) if task in counts else ABSENT for task in TITLES]
        return [name, *cells, *(rest or [""] * 3)]

    def used(task: str, which: str) -> str:
        sizes = {str(result["rows"][which]) for _, result in _cells(asked, found, task)}
        return " or ".join(sorted(sizes)) or NOTHING

    def constant(task: str) -> str:
        scores = {result["constant"] for _, result in _cells(asked, found, task)} - {None}
        return f"{100 * max(scores):.1f}" if scores else NOTHING

    def reached(label: str) -> Callable[[str], str]:
        return lambda task: shown(values(found, label, asked.sets.get(task, ""), score))

    rows = [
        line("published rows: train", lambda task: f"{counts[task]['train']:,}"),
        line("published rows: validation", lambda task: f"{counts[task]['validation']:,}"),
        line("rows that train", lambda task: used(task, "train")),
        line("rows that select", lambda task: used(task, "select")),
        line("rows that report", lambda task: used(task, "report")),
        line("one label for all rows", constant),
    ]
    for label in learned:
        mean = shown(mean_over(found, label, [asked.sets[task] for task in tasks], score))
        rows.append(line(label, reached(label), mean, stored(found[label]), cost(found[label])[0]))
    return markdown(["", *TITLES.values(), f"mean of {len(tasks)}", "stored bytes", "CPU seconds"], rows)


def metrics_table(asked: Asked, found: Found) -> str:
    """The parts of scores that have two."""
    names = [(task, metric) for task, set_name in asked.sets.items() for metric in _metrics(set_name)]
    rows = []
    for label in (label for label in found if " @ " not in label):
        cells = [
            shown(values(found, label, asked.sets[task], lambda result, metric=metric: _metric(result, metric)))
            for task, metric in names
        ]
        rows.append([label, *cells])
    return markdown(["", *(f"{TITLES[task]} {metric}" for task, metric in names)], rows)


def _metrics(set_name: str) -> tuple[str, ...]:
    metrics = SUPERGLUE[set_name].task.metrics
    return metrics if len(metrics) > 1 else ()


def _metric(result: Mapping[str, Any], name: str) -> float:
    return 100 * float(result["held_out"]["metrics"][name])


def gain_table(asked: Asked, found: Found) -> str:
    """Residual prompt tuning against plain prompt tuning and against full fine-tuning, paired by seed."""
    tasks, others = _measured(asked, found), [label for label in (PT, FULL_TUNING) if label in found]
    gaps = {other: {task: _gap(asked, found, task, other) for task in tasks} for other in others}
    rows = [[TITLES[task], *(shown(gaps[other][task]) for other in others)] for task in tasks]
    if tasks:
        rows.append(["**mean**, 95 % interval over seeds", *(shown(_over_seeds(gaps[other])) for other in others)])
        rows.append(["**mean**, 95 % interval over tasks", *(_over_tasks(gaps[other]) for other in others)])
        rows.append(["better, of all pairs of a task and a seed", *(_wins(gaps[other]) for other in others)])
    return markdown([f"{RPT} less ...", *others], rows)


def _gap(asked: Asked, found: Found, task: str, other: str) -> dict[int, float]:
    return difference(*(values(found, label, asked.sets[task], score) for label in (RPT, other)))


def _over_seeds(gaps: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    seeds = set.intersection(*(set(own) for own in gaps.values()))
    return {seed: statistics.mean(own[seed] for own in gaps.values()) for seed in sorted(seeds)}


def _over_tasks(gaps: Mapping[str, Mapping[int, float]]) -> str:
    means = [statistics.mean(own.values()) for own in gaps.values() if own]
    return Interval.of(means).shown(1) if means else NOTHING


def _wins(gaps: Mapping[str, Mapping[int, float]]) -> str:
    every = [gap for own in gaps.values() for gap in own.values()]
    return f"{sum(gap > 0 for gap in every)} of {len(every)}, equal in {sum(gap == 0 for gap in every)}"


def rates_table(asked: Asked, found: Found, results: Results) -> str:
    """What was tried, by accuracy on the selection rows with seed 0, and what was taken."""
    rows = []
    for label in (name for name in asked.learners if name in found):
        for rate in RATES[label]:
            cells = [_selected(asked, found, results, task, label, rate) for task in asked.sets]
            rows.append([label, f"{rate:g}", *cells])
    return markdown(["", "rate", *(TITLES[task] for task in asked.sets)], rows)


def _selected(asked: Asked, found: Found, results: Results, task: str, label: str, rate: float) -> str:
    cells = found.get(f"{label} @ {rate:g}", {}).get(asked.sets[task], ())
    if not cells:
        return NOTHING
    result = cells[0][1]
    accuracy, loss = next((point[3], point[2]) for point in result["curve"] if point[0] == result["best_step"])
    told = f"{loss:.3f}" if accuracy is None else f"{100 * accuracy:.1f}"
    return f"**{told}**" if best_rate(rates_of(asked, task, label), results) == rate else told


def _measured(asked: Asked, found: Found) -> list[str]:
    """Return the tasks on which every learner that has results has some."""
    learned = [own for label, own in found.items() if label in LEARNERS]
    return [task for task, set_name in asked.sets.items() if learned and all(set_name in own for own in learned)]


def _cells(asked: Asked, found: Found, task: str) -> list[tuple[Cell, dict[str, Any]]]:
    return [pair for own in found.values() for pair in own.get(asked.sets.get(task, ""), ())]


def plot_scores(asked: Asked, found: Found, path: Path) -> None:
    """Score of every learner on every task, with what one label for all rows scores."""
    tasks, learned = _measured(asked, found), [label for label in found if label in LEARNERS]
    if not tasks:
        return
    figure = Figure(figsize=(8, 3.4))
    axes = figure.add_subplot()
    for number, (color, label) in enumerate(zip(COLORS, learned, strict=False)):
        intervals = [Interval.of(list(values(found, label, asked.sets[task], score).values())) for task in tasks]
        places = [at + (number - (len(learned) - 1) / 2) * 0.12 for at in range(len(tasks))]
        halves = [each.half or 0.0 for each in intervals]
        axes.errorbar(places, [each.mean for each in intervals], halves, fmt="o", capsize=3, color=color, label=label)
    for at, task in enumerate(tasks):
        constants = [result["constant"] for _, result in _cells(asked, found, task) if result["constant"] is not None]
        if constants:
            axes.hlines(100 * max(constants), at - 0.4, at + 0.4, color=COLORS[-1], linestyles=":")
    axes.set_xticks(range(len(tasks)), [TITLES[task] for task in tasks])
    named(axes, "dotted: one label for all rows", "", "score, percent")
    saved(figure, path)


def plot_superglue(asked: Asked, results: Results, folder: Path) -> None:
    """Write both plots."""
    found = found_in(asked, results)
    folder.mkdir(parents=True, exist_ok=True)
    plot_scores(asked, found, folder / "superglue.png")
    plot_curves(found, asked.learners, folder / "superglue_curves.png")


def lines_of(asked: Asked, results: Results) -> list[str]:
    """Return every result as a line of JSON."""
    return [
        json.dumps({"experiment": "superglue", "learner": label, **result}, separators=(",", ":"))
        for label, by_task in found_in(asked, results).items()
        for cells in by_task.values()
        for _, result in cells
    ]


def facts_of(asked: Asked, common: Mapping[str, str], found: Found) -> dict[str, str]:
    """Return what the tables have in common; `common` holds the model and the machine."""
    num_evaluations = min(asked.scale.num_evaluations, MAX_EVALUATIONS)
    steps = ", ".join(f"{TITLES[task]} {SUPERGLUE[name].num_steps}" for task, name in asked.sets.items())
    cuts = ", ".join(
        f"{TITLES[task]} {field} {count}"
        for task, name in asked.sets.items()
        for field, count in SUPERGLUE[name].max_words.items()
    )
    form = {
        "head": "fields joined by the separator, in one segment; a linear head over the pooled first token",
        "text": "text to text, taskless; WSC is generated",
    }[asked.how]
    return {
        "model": common["model"],
        "format": form,
        "seeds": f"{asked.scale.num_seeds}; they draw the training rows, their order and the start",
        "steps": f"{steps}; of {asked.scale.batch_size} rows, the same for every learner",
        "cut, in words": cuts,
        "rates": f"{len(RATES[PT])} a learner and task, tried with seed 0",
        "training": "AdamW, constant rate after 5 % warm-up, gradient norms clipped at 1, no dropout; the best of "
        f"{num_evaluations} evaluations on selecting rows is kept",
        "intervals": common["intervals"],
        "machine": common["machine"],
        "learners": ", ".join(label for label in LEARNERS if label in found),
    }

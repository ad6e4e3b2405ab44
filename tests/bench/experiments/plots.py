"""From results to PNG files; nothing here runs a model."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.experiments.plans import LENGTHS, PROMPTS, PT, RATES, RPT, SHOTS
from tests.bench.experiments.run import KNOWN
from tests.bench.experiments.sets import SETS
from tests.bench.experiments.stats import Interval
from tests.bench.experiments.tables import Found, accuracy, common_tasks, mean_over

COLORS = ("#4477aa", "#cc6677", "#999933", "#117733", "#882255", "#88ccee", "#444444")
DPI = 90


def plot_curves(found: Found, labels: Iterable[str], path: Path) -> None:
    """Validation loss over steps, of every task; mean and range over seeds."""
    learners = list(labels)
    tasks = [task for task in KNOWN if any(found.get(label, {}).get(task) for label in learners)]
    if not tasks:
        return
    figure = Figure(figsize=(4 * min(3, len(tasks)), 3 * -(-len(tasks) // 3)))
    for at, task in enumerate(tasks):
        axes = figure.add_subplot(-(-len(tasks) // 3), min(3, len(tasks)), at + 1)
        for color, label in zip(COLORS, learners, strict=False):
            curves = [result["curve"] for _, result in found.get(label, {}).get(task, ())]
            if curves:
                # As far as all seeds went: a training ends where it no longer gains.
                columns = [[point[1] for point in points] for points in zip(*curves, strict=False)]
                steps = [point[0] for point in curves[0]][: len(columns)]
                axes.plot(steps, [statistics.mean(column) for column in columns], color=color, label=label)
                axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.15)
        named(axes, KNOWN[task].title.split(":")[0], "step", "validation loss")
    saved(figure, path)


def plot_grid(found: Found, learners: Sequence[str], points: Sequence[float], name: str, path: Path) -> None:
    """Mean accuracy of the classification tasks over a grid of labels `learner @ value`."""
    tasks = common_tasks(found)
    figure = Figure(figsize=(5, 3.2))
    axes = figure.add_subplot()
    for color, learner in zip(COLORS, learners, strict=False):
        reached = {point: mean_over(found, f"{learner} @ {point:g}", tasks, accuracy) for point in points}
        intervals = {point: Interval.of(list(own.values())) for point, own in reached.items() if own}
        if intervals:
            axes.errorbar(
                list(intervals),
                [each.mean for each in intervals.values()],
                [each.half or 0.0 for each in intervals.values()],
                color=color,
                label=learner,
                capsize=3,
                marker="o",
            )
    axes.set_xscale("log")
    axes.set_xticks(list(points), [f"{point:g}" for point in points], minor=False)
    axes.minorticks_off()
    named(axes, "", name, "accuracy, percent")
    saved(figure, path)


def plot_costs(found: Found, path: Path) -> None:
    """Bytes that a tenant stores against accuracy."""
    tasks = common_tasks(found)
    figure = Figure(figsize=(6, 3.6))
    axes = figure.add_subplot()
    for label, own in found.items():
        scores = mean_over(found, label, tasks, accuracy)
        sizes = [result["stored_bytes"] for cells in own.values() for _, result in cells]
        if scores and max(sizes):
            each = Interval.of(list(scores.values()))
            axes.errorbar(max(sizes), each.mean, each.half or 0.0, marker="o", capsize=3, color=COLORS[0])
            axes.annotate(label, (max(sizes), each.mean), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("bytes stored for each tenant")
    axes.set_ylabel("accuracy, percent")
    axes.grid(alpha=0.3)
    saved(figure, path)


def plot_branch(found: Found, path: Path) -> None:
    """|phi(P)| / |P| of each virtual token, at the start and at the best step."""
    tasks = [task for task, cells in found.get(RPT, {}).items() if cells]
    if not tasks:
        return
    figure = Figure(figsize=(6, 3.2))
    axes = figure.add_subplot()
    for color, task in zip(COLORS, tasks, strict=False):
        for style, when in ((":", "start"), ("-", "best")):
            columns = zip(*(result["branch_share"][when] for _, result in found[RPT][task]), strict=True)
            means = [statistics.mean(column) for column in columns]
            label = SETS[task].title.split(":")[0] if when == "best" else None
            axes.plot(range(1, len(means) + 1), means, style, color=color, label=label)
    named(axes, "dotted: start; full: best step", "virtual token", "|phi(P)| / |P|")
    saved(figure, path)


def plot_all(found: dict[str, Found], folder: Path) -> None:
    """Write every plot."""
    mpl.rcParams.update({"font.size": 8, "svg.hashsalt": "promptd"})
    folder.mkdir(parents=True, exist_ok=True)
    plot_curves(found["core"], PROMPTS, folder / "curves.png")
    plot_costs(found["core"], folder / "costs.png")
    plot_branch(found["core"], folder / "branch.png")
    plot_grid(found["rates"], (PT, RPT), RATES, "learning rate, in units of the embeddings' deviation",
              folder / "rates.png")  # fmt: skip
    learners = list(dict.fromkeys(label.split(" @ ")[0] for label in found["lengths"]))
    plot_grid(found["lengths"], learners, LENGTHS, "virtual tokens", folder / "lengths.png")
    learners = list(dict.fromkeys(label.split(" @ ")[0] for label in found["shots"]))
    plot_grid(found["shots"], learners, SHOTS, "rows of each label", folder / "shots.png")


def named(axes: Axes, title: str, x: str, y: str) -> None:
    """Put titles, a grid and, where anything has a label, a legend on axes."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)


def saved(figure: Figure, path: Path) -> None:
    """Write a PNG file that is the same for the same figure."""
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, metadata={"Software": None})

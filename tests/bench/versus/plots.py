"""From the book to PNG files; nothing here runs a model."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.bench.book import Book
from tests.bench.scale import Scale
from tests.bench.versus.contenders import CONTENDERS
from tests.bench.versus.load import key_of as load_key
from tests.bench.versus.tables import COLUMNS, measured, rates

COLORS = (
    "#4477aa", "#88ccee", "#0a2f6b", "#332288", "#cc6677", "#999933", "#ddcc77", "#117733", "#44aa77", "#882255",
    "#aa4499", "#444444", "#888888",
)  # fmt: skip
DPI = 90
_OF = dict(zip(CONTENDERS, COLORS, strict=True))


def plot_all(book: Book, scale: Scale, folder: Path) -> None:
    """Write every plot that has numbers."""
    mpl.rcParams.update({"font.size": 8})
    plot_rates(book, scale, folder / "rates.png")
    plot_memory(book, scale, folder / "memory.png")
    plot_load(book, scale, folder / "load.png")


def plot_rates(book: Book, scale: Scale, path: Path) -> None:
    """Tokens per second of every engine, a panel a model; bars reach the median, whiskers the least and the most."""
    models = [model for model in scale.versus_models if measured(book, model)]
    if not models:
        return
    figure = Figure(figsize=(12, 2.8 * len(models)))
    for at, model in enumerate(models):
        axes = figure.add_subplot(len(models), 1, at + 1)
        names = measured(book, model)
        width = 0.84 / len(names)
        for number, name in enumerate(names):
            found = {x: rates(book, model, workload, name) for x, workload in enumerate(COLUMNS)}
            found = {x: values for x, values in found.items() if values}
            middle = {x: statistics.median(values) for x, values in found.items()}
            below = [middle[x] - min(values) for x, values in found.items()]
            above = [max(values) - middle[x] for x, values in found.items()]
            axes.bar(
                [x + (number - (len(names) - 1) / 2) * width for x in found],
                list(middle.values()),
                width,
                yerr=[below, above],
                error_kw={"linewidth": 0.6},
                color=_OF[name],
                label=name,
            )
        axes.set_xticks(range(len(COLUMNS)), list(COLUMNS.values()))
        axes.set_title(model, fontsize=9)
        axes.set_ylabel("tokens/s")
        axes.set_yscale("log")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, never over them
    _save(figure, path)


def plot_memory(book: Book, scale: Scale, path: Path) -> None:
    """Peak resident memory."""
    models = [model for model in scale.versus_models if measured(book, model)]
    if not models:
        return
    figure = Figure(figsize=(3.4 * len(models), 3))
    for at, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), at + 1)
        peaks = {name: book.fact(f"versus/{model}/{name}/peak_bytes") for name in measured(book, model)}
        peaks = {name: peak / 1e9 for name, peak in peaks.items() if peak}
        axes.barh(list(peaks), list(peaks.values()), color=[_OF[name] for name in peaks])
        axes.invert_yaxis()
        axes.set_title(model, fontsize=9)
        axes.set_xlabel("GB")
        if at:
            axes.set_yticklabels([])
    _save(figure, path)


def plot_load(book: Book, scale: Scale, path: Path) -> None:
    """Milliseconds between tokens over the load; full: p99, dotted: median."""
    found = {
        (model, name): {
            share: fact
            for share in scale.load_shares
            if (fact := book.fact(f"{load_key(model, name)}/{share}")) is not None
        }
        for model in scale.load_models
        for name in CONTENDERS
    }
    found = {key: facts for key, facts in found.items() if facts}
    if not found:
        return
    figure = Figure(figsize=(5, 3.2))
    axes = figure.add_subplot()
    for (model, name), facts in found.items():
        for style, at in (("-", 99), (":", 50)):
            label = f"{name}, {model}" if at == 99 else None
            values = [fact[f"gap_p{at}_ms"] for fact in facts.values()]
            axes.plot([100 * share for share in facts], values, style, marker="o", color=_OF[name], label=label)
    axes.set_xlabel("load, percent of the engine's own capacity")
    axes.set_ylabel("ms between tokens (full: p99, dotted: median)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI, metadata={"Software": None})

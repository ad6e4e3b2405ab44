"""From the book to a page: tables between marks are replaced, what stands around them is left alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench.book import Book, Row, markdown
from tests.bench.scale import Scale
from tests.bench.versus import plots, tables


def filled(text: str, made: Mapping[str, str]) -> str:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Raises `KeyError` for other names."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- begin {name} -->\n{made[name]}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", table, text, flags=re.DOTALL)


def tables_of(book: Book, scale: Scale, rows: Sequence[Row]) -> dict[str, str]:
    """Return every table by the name of its mark; `rows` are those of all checks that were run."""
    models = scale.versus_models
    return {
        "setting": tables.setting_table(book, scale),
        "targets": markdown(rows),
        "rates": tables.rates_table(book, models),
        "ratios": tables.ratios_table(book, models),
        "steps": tables.steps_table(book, models),
        "costs": tables.costs_table(book, models),
        "agreement": tables.agreement_table(book, models),
        "load": tables.load_table(book, scale.load_models),
        "absent": tables.absent_table(book, models),
    }


def write_page(page: Path, book: Book, scale: Scale, rows: Sequence[Row]) -> None:
    """Fill the page's tables; plots and the book's numbers go into the folder of its name."""
    page.write_text(filled(page.read_text(encoding="utf-8"), tables_of(book, scale, rows)), encoding="utf-8")
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    plots.plot_all(book, scale, folder)
    (folder / "results.json").write_text(book.to_json(), encoding="utf-8")

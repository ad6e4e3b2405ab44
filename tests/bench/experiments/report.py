"""From results to a page: tables between marks are replaced, what stands around them is left alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.experiments import tables
from tests.bench.experiments.behaviours import behaviours_table
from tests.bench.experiments.cells import Results
from tests.bench.experiments.plans import EXPERIMENTS, Scale
from tests.bench.experiments.plots import plot_all
from tests.bench.experiments.tables import Found
from tests.bench.page import filled


def tables_of(found: Mapping[str, Found], facts: Mapping[str, Any]) -> dict[str, str]:
    """Return every table by the name of its mark."""
    return {
        "setting": tables.markdown(["", ""], [[name, str(value)] for name, value in facts.items()]),
        "behaviours": behaviours_table(found),
        "core": tables.core_table(found["core"]),
        "claim": tables.claim_table(found["core"]),
        "shift": tables.shift_table(found["core"]),
        "users": tables.users_table(found["core"]),
        "branch": tables.branch_table(found["core"]),
        "rates": tables.grid_table(found["rates"], "rate"),
        "weight_rates": tables.grid_table(found["weight_rates"], "rate, in units of the core table's"),
        "inits": tables.grid_table(found["inits"], "start"),
        "lengths": tables.grid_table(found["lengths"], "tokens"),
        "shots": tables.grid_table(found["shots"], "rows a label", with_loss=False),
        "ablations": tables.list_table(found["ablations"]),
        "prefixes": tables.list_table(found["prefixes"]),
    }


def report(scale: Scale, results: Results, facts: Mapping[str, Any], out: Path, page: Path | None) -> dict[str, str]:
    """Write `tables.md`, `results.json` and the plots to `out`; fill the page where there is one."""
    found = {name: tables.found_for(name, scale, results) for name in EXPERIMENTS}
    made = tables_of(found, facts)
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in made.items())
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    plot_all(found, out / "plots" if page is None else page.with_suffix(""))
    if page is not None:
        page.write_text(filled(page.read_text(encoding="utf-8"), made), encoding="utf-8")
        lines = [
            json.dumps({"experiment": name, "learner": label, **result}, separators=(",", ":"))
            for name, own in found.items()
            for label, by_task in own.items()
            for cells in by_task.values()
            for _, result in cells
        ]
        (page.with_suffix("") / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made

"""From results to a page: tables between marks are replaced, what stands around them is left alone.

One model's results fill the tables that they have something for. What another model filled stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from tests.bench.experiments import generation, generation_tables, superglue_tables, tables
from tests.bench.experiments.behaviours import behaviours_table
from tests.bench.experiments.cells import Results
from tests.bench.experiments.plans import EXPERIMENTS, Scale
from tests.bench.experiments.plots import plot_all
from tests.bench.experiments.superglue import Asked
from tests.bench.experiments.tables import Found
from tests.bench.page import filled


def report(
    scale: Scale,
    results: Results,
    facts: Mapping[str, str],
    out: Path,
    page: Path | None,
    asked: Asked,
    texts: generation.Asked | None,
) -> dict[str, str]:
    """Write `tables.md` and the plots to `out`; fill the page where there is one, with plots and results beside it.

    `facts` are what all tables have in common, `asked` says how SuperGLUE was asked, and `texts`, of models that
    write, how generation was. Returns the tables by name.
    """
    plots = out / "plots" if page is None else page.with_suffix("")
    found = {name: tables.found_for(name, scale, results) for name in EXPERIMENTS}
    made: dict[str, str] = {}
    lines: dict[str, list[str]] = {}
    if any(cells for own in found.values() for by_task in own.values() for cells in by_task.values()):
        made |= tables_of(found, facts)
        lines["results.jsonl"] = _lines_of(found)
        plot_all(found, plots)
    superglue = superglue_tables.found_in(asked, results)
    if superglue:
        own_facts = superglue_tables.facts_of(asked, facts, superglue)
        made |= superglue_tables.tables_of(asked, results, own_facts)
        lines["superglue.jsonl"] = superglue_tables.lines_of(asked, results)
        superglue_tables.plot_superglue(asked, results, plots)
    if texts is not None and generation_tables.found_in(texts, results):
        mark = texts.mark
        own_tables = generation_tables.tables_of(texts, results, facts)
        made |= {f"{mark}_{name}": table for name, table in own_tables.items()}
        lines[f"{mark}.jsonl"] = generation_tables.lines_of(texts, results)
        generation_tables.plot(texts, results, plots / f"{mark}.png")
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in made.items())
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    if page is not None:
        before = page.read_text(encoding="utf-8")
        page.write_text(filled(before, {**_tables_on(before), **made}), encoding="utf-8")
        for name, own in lines.items():
            (page.with_suffix("") / name).write_text("\n".join(own) + "\n", encoding="utf-8")
    return made


def tables_of(found: Mapping[str, Found], facts: Mapping[str, str]) -> dict[str, str]:
    """Return every table but SuperGLUE's by the name of its mark."""
    return {
        "setting": tables.markdown(["", ""], [list(fact) for fact in facts.items()]),
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


def _tables_on(text: str) -> dict[str, str]:
    """Return what stands between marks now."""
    return dict(re.findall(r"<!-- begin (\w+) -->\n(.*?)\n?<!-- end \1 -->", text, flags=re.DOTALL))


def _lines_of(found: Mapping[str, Found]) -> list[str]:
    return [
        json.dumps({"experiment": name, "learner": label, **result}, separators=(",", ":"))
        for name, own in found.items()
        for label, by_task in own.items()
        for cells in by_task.values()
        for _, result in cells
    ]

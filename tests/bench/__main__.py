"""`python -m tests.bench [check ...]`: the side-by-side runs, one command; prints a table of targets and results.

Every check alternates what it compares, inside one process or between processes of which one runs and the others are
stopped. Results are kept in a JSON file after each measurement: an interrupted run goes on where it stopped, and
`--fresh` begins anew. `--prepare` installs peers and converts models beforehand; `--page` writes what is known into a
page, and `report` measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.bench import (
    console,
    encoders,
    fleet,
    http_path,
    latency,
    memory,
    products,
    seq2seq,
    server,
    soak,
    stored,
    throughput,
    training,
)
from tests.bench.book import Book, Row, markdown
from tests.bench.machine import machine
from tests.bench.models import folder_of
from tests.bench.page import write_page
from tests.bench.scale import FULL, SMOKE, Scale
from tests.bench.versus import alternate, load
from tests.bench.versus.contenders import CONTENDERS, prepare_all

Check = Callable[[Scale, Book, Path], list[Row]]
CHECKS: dict[str, Check] = {
    "versus": alternate.check_versus,
    "load": load.check_load,
    "stored": stored.check_stored,
    "w1": throughput.check_w1,
    "mixing": throughput.check_mixing,
    "overhead": throughput.check_overhead,
    "products": products.check_products,
    "encoders": encoders.check_encoders,
    "seq2seq": seq2seq.check_seq2seq,
    "resident": latency.check_resident,
    "http": server.check_http,
    "http-path": http_path.check_http_path,
    "first-use": latency.check_first_use,
    "bytes": memory.check_resident_bytes,
    "growth": memory.check_growth,
    "soak": soak.check_soak,
    "ready": server.check_ready,
    "train-step": training.check_step,
    "many-jobs": training.check_many,
    "inline": training.check_inline,
    "after-job": server.check_after_job,
    "console": console.check_console,
    "listing": console.check_listing,
    "replicas": fleet.check_replicas,
    "publish": fleet.check_publish,
}
DEFAULT_FOLDER = Path("build/bench")  # ignored by git


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the named checks, or all; return the table's rows."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="check", help=f"{', '.join(CHECKS)}, or report; default: all")
    parser.add_argument("--threads", type=int, default=2, help="threads of every engine; default 2")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="models, peers and results.json go here")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured with these settings")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: proves that it runs, times mean nothing")
    parser.add_argument("--models", nargs="+", help=f"of versus and load: {', '.join(FULL.versus_models)}")
    parser.add_argument("--workloads", nargs="+", help="of versus: these alone")
    parser.add_argument("--peers", nargs="+", help=f"of versus and load: {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, help="of versus: so many")
    parser.add_argument("--prepare", action="store_true", help="install, convert and fill; measure nothing")
    parser.add_argument("--page", type=Path, help="fill this page's tables, and put plots beside it")
    options = parser.parse_args(arguments)
    unknown = set(options.checks) - {*CHECKS, "report"}
    if unknown:
        parser.error(f"unknown check {min(unknown)!r}; there are {', '.join(CHECKS)} and report")
    if unknown := set(options.peers or ()) - set(CONTENDERS):
        parser.error(f"unknown peer {min(unknown)!r}; there are {', '.join(CONTENDERS)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    scale = _scale(options)
    book = Book(options.folder / "results.json", f"{'smoke' if options.smoke else 'full'}, {options.threads} threads")
    root = options.folder / "models"
    if options.prepare:
        models = [folder_of(name, root) for name in dict.fromkeys([*scale.versus_models, *scale.load_models])]
        prepare_all(models, scale.peers or list(CONTENDERS), root)
        if not options.checks or "stored" in options.checks:
            stored.prepare(scale, root)
        return []
    if options.fresh:
        book.forget()
    rows: list[Row] = []
    for name in [] if options.checks == ["report"] else options.checks or CHECKS:
        print(f"... {name}", flush=True)
        book.note("machine", machine())
        own = CHECKS[name](scale, book, root)
        known = {row["check"]: row for row in book.fact(f"rows/{name}") or ()}  # of other models, say
        book.note(f"rows/{name}", [*(known | {row.check: dataclasses.asdict(row) for row in own}).values()])
        rows += own
    if options.page is not None or options.checks == ["report"]:
        rows = [Row(**row) for name in CHECKS for row in book.fact(f"rows/{name}") or ()]
    if options.page is not None:
        write_page(options.page, book, scale, rows)
    print(f"\n{book.fact('machine')}, {options.threads} threads\n\n{markdown(rows)}")
    return rows


def _scale(options: argparse.Namespace) -> Scale:
    """Return the sizes that were asked for."""
    scale = SMOKE if options.smoke else FULL
    if options.models:
        scale = dataclasses.replace(scale, versus_models=tuple(options.models), load_models=tuple(options.models))
    return dataclasses.replace(
        scale,
        workloads=tuple(options.workloads or scale.workloads),
        peers=tuple(options.peers or scale.peers),
        versus_rounds=options.rounds or scale.versus_rounds,
    )


if __name__ == "__main__":
    main()

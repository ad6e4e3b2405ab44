"""`python -m tests.bench [check ...]`: the side-by-side runs, one command; prints a table of targets and results.

Every check alternates what it compares inside one process. Results are kept in a JSON file after each measurement:
an interrupted run goes on where it stopped, and `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from tests.bench import encoders, latency, memory, server, throughput, training
from tests.bench.book import Book, Row, markdown
from tests.bench.scale import FULL, SMOKE, Scale

Check = Callable[[Scale, Book, Path], list[Row]]
CHECKS: dict[str, Check] = {
    "w1": throughput.check_w1,
    "mixing": throughput.check_mixing,
    "overhead": throughput.check_overhead,
    "encoders": encoders.check_encoders,
    "resident": latency.check_resident,
    "http": server.check_http,
    "first-use": latency.check_first_use,
    "bytes": memory.check_resident_bytes,
    "growth": memory.check_growth,
    "ready": server.check_ready,
    "train-step": training.check_step,
    "many-jobs": training.check_many,
    "inline": training.check_inline,
    "after-job": server.check_after_job,
}
DEFAULT_FOLDER = Path("build/bench")  # ignored by git


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the named checks, or all; return the table's rows."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="check", help=f"{', '.join(CHECKS)}; default: all")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; default 2")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="models and results.json go here")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured with these settings")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: proves that it runs, times mean nothing")
    options = parser.parse_args(arguments)
    unknown = set(options.checks) - set(CHECKS)
    if unknown:
        parser.error(f"unknown check {min(unknown)!r}; there are {', '.join(CHECKS)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    scale = SMOKE if options.smoke else FULL
    book = Book(options.folder / "results.json", f"{'smoke' if options.smoke else 'full'}, {options.threads} threads")
    if options.fresh:
        book.forget()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    book.note("machine", f"{platform.machine()}, Python {platform.python_version()}, {versions}")
    rows: list[Row] = []
    for name in options.checks or CHECKS:
        print(f"... {name}", flush=True)
        rows += CHECKS[name](scale, book, options.folder / "models")
    print(f"\n{book.fact('machine')}, {options.threads} threads\n\n{markdown(rows)}")
    return rows


if __name__ == "__main__":
    main()

"""Jobs on the terminal: one line, a table of many, and everything about one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from promptd.commands.console import human_seconds, out, print_json
from promptd.commands.job_progress import numbers_of

if TYPE_CHECKING:
    from promptd_client import Job, JobEvent

WIDE = 100
"""Columns of a terminal from which on the list shows losses."""
MIN_PROMPT_CHARS = 8
_COLOURS = {"succeeded": "green", "failed": "red", "running": "cyan"}


def print_job(job: Job, *, as_json: bool) -> None:
    """Print a job's state, and what came of it."""
    from rich.markup import escape

    if as_json:
        print_json(job.model_dump())
        return
    out().print(f"{job.id}  {_coloured(job.status)}  {escape(job.prompt)}", soft_wrap=True)
    for line in _outcome(job):
        out().print(f"  {escape(line)}", soft_wrap=True)


def print_table(jobs: Sequence[Job]) -> None:
    """Print one line a job. Ids are never cut: they are what the other commands take."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console = out()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [_cells(job) for job in jobs]
    shown = [name for name in cells[0] if name != "loss" or console.width >= WIDE]
    widths = {name: max(len(row[name]) for row in [*cells, {name: name}]) for name in shown}
    room = console.width - sum(widths[name] + 3 for name in shown if name != "prompt")
    for name in shown:
        table.add_column(name, no_wrap=True, justify="right" if name in ("step", "loss", "age") else "left")
    for row in cells:
        row["prompt"] = _cut(row["prompt"], max(MIN_PROMPT_CHARS, room - 3))
        table.add_row(*(_coloured(row[name]) if name == "status" else escape(row[name]) for name in shown))
    console.print(table)


def _cells(job: Job) -> dict[str, str]:
    progress = job.progress
    return {
        "job": job.id,
        "status": job.status,
        "prompt": job.prompt,
        "step": "" if progress is None else f"{progress.step}/{progress.num_steps}",
        "loss": "" if progress is None or progress.loss is None else f"{progress.loss:.3f}",
        "age": human_seconds(max(0.0, time.time() - job.created_at)),
    }


def _cut(text: str, num_chars: int) -> str:
    return text if len(text) <= num_chars else text[: num_chars - 1] + "…"


def print_details(job: Job, events: Sequence[JobEvent]) -> None:
    """Print a job's settings, its progress or outcome, and its last events; given newest first, shown oldest first."""
    from rich.markup import escape

    print_job(job, as_json=False)
    name = str(job.method.get("type", ""))
    values = job.method.get(name, {}).get("hyperparameters", {})
    facts = [
        ("method", f"{name} {', '.join(f'{key}={value}' for key, value in values.items())}".rstrip()),
        ("rows", job.training_file or "given with the job"),
        ("validation", job.validation_file),
        ("starts from", job.base_prompt),
        ("stands behind", ", ".join(job.behind)),
        ("template", None if job.template is None else repr(job.template)),
        ("label words", ", ".join(f"{label}={word!r}" for label, word in (job.label_words or {}).items())),
        ("progress", None if job.progress is None or job.has_ended else numbers_of(job.progress)),
    ]
    for label, fact in facts:
        if fact:
            out().print(f"  [dim]{label:<14}[/]{escape(str(fact))}", soft_wrap=True)
    for event in reversed(events):
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.created_at))
        progress = "" if event.progress is None else f"  {numbers_of(event.progress)}"
        out().print(f"  [dim]{at}[/]  {escape(event.message)}{progress}", soft_wrap=True)


def _outcome(job: Job) -> list[str]:
    """Return what came of a job, in lines."""
    lines: list[str] = []
    if job.result is not None:
        before, after = job.result.scores_before, job.result.scores_after
        rows = f"on {after['num_rows']} held-out rows" if "num_rows" in after else "on held-out rows"
        lines += [
            f"{name} {_score(name, before)} -> {_score(name, after)} {rows}"
            for name in after
            if name != "num_rows" and name in before
        ]
        lines.append(f"{job.result.prompt} is v{job.result.number}  {job.result.version}")
    if job.error is not None:
        lines.append(f"{job.error.code}: {job.error.message}")
    return lines


def _score(name: str, scores: Mapping[str, Any]) -> str:
    return f"{scores[name]:.1%}" if name == "accuracy" else f"{scores[name]:.3f}"


def _coloured(status: str) -> str:
    colour = _COLOURS.get(status)
    return status if colour is None else f"[{colour}]{status}[/]"

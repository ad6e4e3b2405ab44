"""A job's events on the terminal: a live bar with loss, speed and time left; plain lines where nobody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from promptd.commands.console import err

if TYPE_CHECKING:
    from promptd_client import Job, JobEvent, JobProgress


@contextmanager
def job_progress(job: Job) -> Iterator[Callable[[JobEvent], None]]:
    """Yield what shows an event."""
    console = err()
    if not console.is_terminal:
        yield lambda event: console.print(_line(event), markup=False)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(job.status, total=None, numbers="")

        def show(event: JobEvent) -> None:
            progress = event.progress
            if progress is not None:
                bar.update(task, completed=progress.step, total=progress.num_steps, numbers=_numbers(progress))
            else:
                bar.update(task, description=str(event.data.get("state", bar.tasks[0].description)))
                bar.console.print(event.message, markup=False)

        yield show


def _line(event: JobEvent) -> str:
    progress = event.progress
    return event.message if progress is None else f"{event.message}  {_numbers(progress)}"


def _numbers(progress: JobProgress) -> str:
    parts = [
        ("loss {:.4f}", progress.loss),
        ("validation {:.4f}", progress.validation_loss),
        ("{:.0f} tokens/s", progress.tokens_per_second),
        ("{:.0f} s left", progress.eta_seconds),
    ]
    return "  ".join(text.format(value) for text, value in parts if value is not None)

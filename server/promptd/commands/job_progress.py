"""Training on the terminal: live bars with loss, speed and time left; plain lines where nobody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from promptd.commands.console import err, human_seconds

if TYPE_CHECKING:
    from promptd_client import Job, JobEvent
    from promptd_client import JobProgress as ReportedProgress
    from rich.progress import Progress, TaskID

    from promptd.jobs import JobProgress as OwnProgress

    JobProgress = ReportedProgress | OwnProgress

MAX_BARS = 8
"""More jobs than these share one bar, which counts jobs."""


class Bars:
    """A bar for each job, by name, and lines above them. Without a terminal there are only lines."""

    def __init__(self, bars: Progress, names: Sequence[str], status: str) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._shares = dict.fromkeys(names, 0.0)
        if len(names) <= MAX_BARS:
            self._tasks = {name: bars.add_task(status, total=None, label=name, numbers="") for name in names}
        else:
            self._all = bars.add_task(status, total=len(names), label=f"{len(names)} jobs", numbers="")

    def move(self, name: str, progress: JobProgress) -> None:
        """Show how far a job is."""
        if name in self._tasks:
            task, numbers = self._tasks[name], numbers_of(progress)
            self._bars.update(task, completed=progress.step, total=progress.num_steps, numbers=numbers)
        else:
            self._shares[name] = progress.step / progress.num_steps
            self._bars.update(self._all, completed=sum(self._shares.values()))

    def tell(self, name: str, status: str) -> None:
        """Show a job's state."""
        if name in self._tasks:
            self._bars.update(self._tasks[name], description=status)

    def end(self, name: str) -> None:
        """Take a job's bar away."""
        if name in self._tasks:
            self._bars.update(self._tasks[name], visible=False)
        else:
            self._shares[name] = 1.0
            self._bars.update(self._all, completed=sum(self._shares.values()))

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(line, markup=False, soft_wrap=True)


@contextmanager
def job_bars(names: Sequence[str], status: str) -> Iterator[Bars]:
    """Yield the bars of some jobs."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.fields[label]}", markup=False),
        TextColumn("{task.description}", markup=False, style="dim"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
    )
    console = err()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bars(progress, names, status)


@contextmanager
def job_progress(job: Job) -> Iterator[Callable[[JobEvent], None]]:
    """Yield what shows an event of a server's job."""
    with job_bars([job.prompt], job.status) as bars:

        def show(event: JobEvent) -> None:
            progress = event.progress
            if progress is not None:
                bars.move(job.prompt, progress)
            else:
                bars.tell(job.prompt, str(event.data.get("state", job.status)))
            if progress is None:
                bars.say(event.message)
            elif progress.validation_loss is not None and not err().is_terminal:  # not a line for every step
                bars.say(f"{event.message}  {numbers_of(progress)}")

        yield show


def numbers_of(progress: JobProgress) -> str:
    """Return loss, speed and time left on one line."""
    parts = [
        ("loss {:.4f}", progress.loss),
        ("validation {:.4f}", progress.validation_loss),
        ("{:.0f} tokens/s", progress.tokens_per_second),
        ("{} left", None if progress.eta_seconds is None else human_seconds(progress.eta_seconds)),
    ]
    return "  ".join(text.format(value) for text, value in parts if value is not None)

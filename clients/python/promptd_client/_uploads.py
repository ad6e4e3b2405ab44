"""Many uploads at once, with a progress bar: what both clients share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from promptd_client.errors import PromptdError
from promptd_client.models import Prompt

if TYPE_CHECKING:
    from collections.abc import Callable

Folders = Mapping[str, str | Path]
"""Prompt name -> PEFT folder."""


@dataclass(frozen=True, slots=True)
class UploadResult:
    """What became of one folder: a prompt or an error, never both."""

    name: str
    folder: Path
    prompt: Prompt | None = None
    error: PromptdError | None = None


@contextmanager
def progress_bar(total: int, *, is_shown: bool) -> Iterator[Callable[[UploadResult], None]]:
    """Show a bar on the terminal's stderr; yield what moves it on by one."""
    if not is_shown:
        yield lambda result: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed = 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("uploading prompts", total=total)

        def move(result: UploadResult) -> None:
            nonlocal failed
            failed += result.error is not None
            description = f"uploading prompts ({failed} failed)" if failed else "uploading prompts"
            progress.update(task, advance=1, description=description)

        yield move

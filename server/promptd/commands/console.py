"""What all commands share: the terminal, the connection to a server, and errors as one clear line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from promptd.json_line import json_line

if TYPE_CHECKING:
    from promptd_client import Client, PromptdError
    from rich.console import Console

DEFAULT_URL = "http://127.0.0.1:8000"
PIPED_WIDTH = 200
"""Columns where nobody looks at a terminal: lines stay whole for grep and the like."""

Url = Annotated[
    str, typer.Option("--url", envvar="PROMPTD_URL", help="The server's address.", rich_help_panel="Server")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="PROMPTD_API_KEY", help="Your key, if it wants one.", rich_help_panel="Server"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]
BaseModel = Annotated[
    str | None, typer.Option("--model", help="Base model: a folder or a hub id.", metavar="PATH_OR_ID")
]


def out() -> Console:
    """Return the console of a command's results."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def err() -> Console:
    """Return the console of progress and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def fail(message: str, *, hint: str | None = None) -> NoReturn:
    """Say what is wrong, and what would help; end with status 1."""
    from rich.markup import escape

    console = err()
    console.print(f"[bold red]error[/] {escape(message)}")
    if hint is not None:
        console.print(f"[dim]{escape(hint)}[/]")
    raise typer.Exit(1)


def print_json(value: Any) -> None:
    """Print one JSON value on one line of stdout."""
    typer.echo(json_line(value))


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Client]:
    """Yield a client; an error of the server or the connection ends the command with its code and message."""
    import promptd_client
    import stamina.instrumentation

    stamina.instrumentation.set_on_retry_hooks([])  # the command says what came of it in the end
    with promptd_client.Client(url, api_key=api_key) as client:
        try:
            yield client
        except promptd_client.ConnectionFailedError as error:
            fail(str(error), hint=f"Is a server running at {url}? Start one with: promptd serve")
        except promptd_client.PromptdError as error:
            fail(describe(error))


def describe(error: PromptdError) -> str:
    """Return `code: message` of a server's error, or just the message."""
    code = getattr(error, "code", None)
    return f"{code}: {error}" if code else str(error)


def human_bytes(count: int) -> str:
    """Return a size as people read it: 61.4 kB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{count} B"


def human_seconds(seconds: float) -> str:
    """Return a duration as people say it: 40 s, 12 min, 3.5 h, 2 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"


def quiet_loading() -> None:
    """Keep transformers' progress bars out of files and pipes."""
    from transformers.utils import logging

    if not err().is_terminal:
        logging.disable_progress_bar()


def read_text(path: Path) -> str:
    """Return a text file's content, or end the command."""
    try:
        return existing(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {error}")


def existing(path: Path) -> Path:
    """Return a path that exists, or end the command."""
    if not path.exists():
        fail(f"{path}: there is no such file or folder")
    return path

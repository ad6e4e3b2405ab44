"""`promptd bench`: hands its options on to promptd.bench, which is imported only now."""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Measure a server, or an engine in this process: tokens/s, time to first token, latency, memory.

    [dim]promptd bench --help[/]  shows its options
    """
    from promptd.bench import run

    inner = typer.Typer(rich_markup_mode="rich", add_completion=False)
    inner.command()(run)
    inner(context.args, prog_name="promptd bench")

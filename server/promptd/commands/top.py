"""`promptd top`: what a server does now, on the terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from promptd.commands.console import DEFAULT_URL, ApiKey, Url, connected, out

if TYPE_CHECKING:
    from promptd_client import Client

    from promptd.commands.top_view import Reading


def top(
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, help="Seconds between two readings.", metavar="S")
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print two readings' worth and end; for files and pipes.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Watch a server: rows, tokens a second, latencies, memory, tenants, the servers beside it. Ctrl-C ends it.

    Tenants and servers are shown to admins' keys.

    [dim]promptd top[/]
    [dim]promptd top --url http://10.0.0.7:8000 --interval 5[/]
    [dim]promptd top --once > now.txt[/]
    """
    from rich.live import Live

    from promptd.commands.top_view import view

    with connected(url, api_key) as client:
        before, now = None, _read(client)
        if once:
            time.sleep(interval)
            out().print(view(_read(client), now))
            return
        try:
            with Live(view(now, before), console=out(), screen=True, auto_refresh=False) as live:
                while True:
                    time.sleep(interval)
                    before, now = now, _read(client)
                    live.update(view(now, before), refresh=True)
        except KeyboardInterrupt:
            return


def _read(client: Client) -> Reading:
    from promptd_client import AuthenticationError, PermissionDeniedError

    from promptd.commands.exposition import parse
    from promptd.commands.top_view import Reading

    samples = parse(client.fleet.metrics())
    try:
        return Reading(time.time(), samples, client.fleet.engine(), client.fleet.servers())
    except (AuthenticationError, PermissionDeniedError):
        return Reading(time.time(), samples)

"""`promptd drain`: take one server out of its load balancer, before it is stopped."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from promptd.commands.console import DEFAULT_URL, Url, connected, err

if TYPE_CHECKING:
    from promptd_client import Drain

POLL_SECONDS = 0.2

AdminKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar=["PROMPTD_API_KEY", "PROMPTD_ADMIN_KEY"],  # the second is at hand where the server itself runs
        help="An admin's key.",
        rich_help_panel="Server",
    ),
]


def drain(
    wait: Annotated[
        float,
        typer.Option(min=0, help="Wait so long for what runs there to end; else status 1.", metavar="S"),
    ] = 0.0,
    undo: Annotated[bool, typer.Option("--undo", help="Let it be ready again.")] = False,
    url: Url = DEFAULT_URL,
    api_key: AdminKey = None,
) -> None:
    """Make a server's /readyz say no, as SIGTERM does first: its balancer sends it nothing new, and it serves on.

    [dim]promptd drain --url http://10.0.0.7:8000[/]
    [dim]promptd drain --wait 20[/]      [dim]as a hook before SIGTERM, which then need not wait for the balancer[/]
    """
    with connected(url, api_key) as client:
        if undo:
            _show(client.undrain())
            return
        until = time.monotonic() + wait
        state = client.drain()
        while not state.is_done and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            state = client.get_drain()
    _show(state)
    if wait and not state.is_done:
        raise typer.Exit(1)


def _show(state: Drain) -> None:
    err().print(f"{state.status}: {state.requests_running} requests running, {state.requests_waiting} waiting")

"""`promptd prompts share | unshare`: with whom a prompt is shared, from the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from promptd.commands.console import DEFAULT_URL, ApiKey, Url, connected, out

Name = Annotated[str, typer.Argument(help="Name of a prompt.")]
Tenants = Annotated[list[str], typer.Option("--with", help="A tenant; again for more.", metavar="TENANT")]


def share(name: Name, tenants: Tenants, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Let other tenants use and read a prompt, all its versions and those to come. They name it OWNER/NAME.

    [dim]promptd prompts share concierge --with globex --with initech[/]
    """
    with connected(url, api_key) as client:
        for tenant in tenants:
            client.prompts.share(name, tenant)
        shown = ", ".join(client.prompts.shares(name))
    out().print(f"{name} is shared with {shown}", soft_wrap=True)


def unshare(name: Name, tenants: Tenants, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Share a prompt no longer. Requests that run already finish."""
    with connected(url, api_key) as client:
        for tenant in tenants:
            client.prompts.unshare(name, tenant)
        shown = ", ".join(client.prompts.shares(name)) or "nobody"
    out().print(f"{name} is shared with {shown}", soft_wrap=True)

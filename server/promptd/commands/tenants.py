"""`promptd tenants show | erase`, `promptd users erase`: a server's tenants and their end users, from the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from promptd.commands.console import DEFAULT_URL, ApiKey, AsJson, Url, connected, err, out, print_json

Name = Annotated[str, typer.Argument(help="Name of a tenant.", metavar="TENANT")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look at tenants, and erase them.",
    epilog="[dim]Needs an admin's key in PROMPTD_API_KEY. Limits are set by promptd apply.[/]",
)
users = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Erase what belongs to one end user of your tenant."
)


@app.command()
def show(tenant: Name, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show a tenant's limits, and what it holds of what there are quotas for."""
    with connected(url, api_key) as client:
        found = client.tenants.get(tenant)
    if as_json:
        print_json(found.model_dump())
        return
    rows = {name: "none" if value is None else str(value) for name, value in found.limits.model_dump().items()}
    rows |= {f"held: {name}": str(value) for name, value in (found.held or {}).items()}
    rows["keys"] = ", ".join(found.active_keys) or "none"
    for server in found.servers or ():
        has = "has forgotten it" if server.has_forgotten else "has not said that it has forgotten it"
        rows[f"{server.host} {server.pid}"] = has + ("; silent" if server.is_silent else "")
    for name, value in rows.items():
        out().print(f"[bold]{name:<26}[/]  {value}", soft_wrap=True)


@app.command()
def erase(tenant: Name, yes: Yes = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Erase a tenant: keys, prompts, files, jobs, usage, and what servers have in memory. Its name is never used again.

    Refused at once, everywhere within a second. Asked again, it finishes what was left.
    """
    if not yes:
        typer.confirm(f"Erase everything of tenant {tenant}, for ever?", abort=True)
    with connected(url, api_key) as client:
        erased = client.tenants.erase(tenant)
    out().print(f"erased tenant {tenant}", soft_wrap=True)
    _print(erased)


@users.command("erase")
def erase_user(
    user: Annotated[str, typer.Argument(help="The user, as prompts, files and jobs name it.")],
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Erase one end user's prompts, files and jobs, and what servers have of them in memory."""
    if not yes:
        typer.confirm(f"Erase everything that belongs to {user}, for ever?", abort=True)
    with connected(url, api_key) as client:
        erased = client.erase_user(user)
    out().print(f"erased user {user}", soft_wrap=True)
    _print(erased)


def _print(erased: Mapping[str, int]) -> None:
    told = ("is_out_of_files", "pending_servers")
    counts = {name.replace("_", " "): count for name, count in erased.items() if name not in told}
    out().print(", ".join(f"{count} {name}" for name, count in counts.items()), soft_wrap=True)
    if late := erased.get("pending_servers"):
        err().print(f"[yellow]not yet said by {late} of the servers that they have forgotten it[/]")
    if not erased.get("is_out_of_files"):
        err().print("[yellow]the store's own files still have it: they are rewritten by the next clean-up[/]")

"""`promptd keys create | ls | rotate | revoke`: the API keys of a server's tenants, from the terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from promptd.commands.console import DEFAULT_URL, ApiKey, AsJson, Url, connected, err, out, print_json

if TYPE_CHECKING:
    from promptd_client import ApiKey as Key
    from promptd_client import IssuedKey

KeyId = Annotated[str, typer.Argument(help="Id of a key: the part behind pd_", metavar="KEY_ID")]

_DAY_SECONDS = 86400.0

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make, list, rotate and revoke API keys.",
    epilog="[dim]Needs an admin's key in PROMPTD_API_KEY, the first one is the server's PROMPTD_ADMIN_KEY.[/]",
)


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            "-s",
            help="infer, prompts:read, prompts:write, train or admin; again for more. Default: all but admin.",
        ),
    ] = None,
    days: Annotated[float | None, typer.Option(help="Days until it ends. Default: never.", metavar="D")] = None,
    label: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Make a key and print it, this one time.

    [dim]promptd keys create acme[/]
    [dim]promptd keys create acme -s infer --days 90 --label web[/]
    """
    with connected(url, api_key) as client:
        issued = client.keys.create(
            tenant, scopes=scope, expires_in_seconds=None if days is None else days * _DAY_SECONDS, label=label
        )
    _print_issued(issued, as_json=as_json)


@app.command("ls")
def list_keys(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List keys; none in the clear."""
    with connected(url, api_key) as client:
        keys = client.keys.list(tenant)
    if as_json:
        for key in keys:
            print_json(key.model_dump())
        return
    if not keys:
        err().print("[dim]no keys yet: promptd keys create TENANT[/]")
        return
    _print_table(keys)


@app.command()
def rotate(
    key_id: KeyId,
    grace_hours: Annotated[
        float | None, typer.Option(help="Hours that the old key works on (24).", metavar="H")
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Make a key that takes another's place."""
    with connected(url, api_key) as client:
        issued = client.keys.rotate(key_id, grace_seconds=None if grace_hours is None else grace_hours * 3600)
    _print_issued(issued, as_json=as_json)


@app.command()
def revoke(
    key_ids: Annotated[list[str], typer.Argument(help="Ids of keys.", metavar="KEY_ID")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """End keys, on every server within a second."""
    for key_id in key_ids:
        with connected(url, api_key) as client:
            client.keys.revoke(key_id)
        out().print(f"revoked {key_id}")


def _print_issued(issued: IssuedKey, *, as_json: bool) -> None:
    if as_json:
        print_json(issued.model_dump())
        return
    typer.echo(issued.key)
    err().print(f"[dim]{issued.id} of {issued.tenant}, for {', '.join(issued.scopes)}; not shown again[/]")


def _print_table(keys: list[Key]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("id", "tenant", "state", "scopes", "label", "ends"):
        table.add_column(column)
    for key in keys:
        ends = "" if key.expires is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(key.expires))
        table.add_row(key.id, key.tenant, key.state, " ".join(key.scopes), key.label, ends)
    out().print(table)

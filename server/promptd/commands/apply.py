"""`promptd apply tenants.yaml`: the limits of many tenants, from one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptd.commands.console import DEFAULT_URL, ApiKey, Url, connected, err, existing, fail, out

if TYPE_CHECKING:
    from promptd_client import Client, Tenant

Changes = dict[str, tuple[Any, Any]]
"""Limit -> what it is, what it shall be."""


def apply(
    file: Annotated[Path, typer.Argument(help="YAML: tenants: {NAME: {weight: 2, requests_per_minute: 100}}")],
    diff: Annotated[bool, typer.Option("--diff", help="Only show what would change; status 1 where anything.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Give tenants the limits that a file says. Again changes nothing.

    A limit that the file does not name is taken away from a tenant that it names; tenants that it does not name stay.

    [dim]promptd apply tenants.yaml --diff[/]
    [dim]promptd apply tenants.yaml[/]
    """
    wanted = _read(existing(file))
    with connected(url, api_key) as client:
        changes = _changes(client, wanted)
        for tenant, changed in changes.items():
            for limit, (before, after) in changed.items():
                out().print(f"{tenant}  {limit}: {_shown(before)} -> {_shown(after)}", soft_wrap=True)
            if not diff:
                client.tenants.set(tenant, **{limit: after for limit, (_, after) in changed.items()})
    if diff and changes:
        err().print(f"[dim]{len(changes)} of {len(wanted)} tenants would change[/]")
        raise typer.Exit(1)
    err().print(f"[dim]{len(changes)} of {len(wanted)} tenants changed[/]")


def _read(file: Path) -> dict[str, Mapping[str, Any]]:
    """Return tenant -> limits; ends the command where the file is something else."""
    import yaml

    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"{file}: {error}")
    tenants = plain.get("tenants") if isinstance(plain, dict) and set(plain) == {"tenants"} else None
    if not isinstance(tenants, dict):
        fail(f"{file}: a mapping with the one key 'tenants' is needed, its value a mapping of tenants")
    for tenant, limits in tenants.items():
        if not isinstance(tenant, str):
            fail(f"{file}: tenant {tenant!r} is no text; quote it")
        if not isinstance(limits, dict | None) or not all(isinstance(name, str) for name in limits or {}):
            fail(f"{file}: the limits of {tenant!r} are no mapping of names to numbers")
    return {tenant: limits or {} for tenant, limits in tenants.items()}


def _changes(client: Client, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Changes]:
    """Return what differs, tenant by tenant."""
    present = {tenant.id: tenant for tenant in client.tenants.list()}
    found: dict[str, Changes] = {}
    for tenant, limits in wanted.items():
        before = _limits_of(present.get(tenant))
        after = {**dict.fromkeys(before), "weight": 1.0, **limits}
        changed = {name: (before.get(name), value) for name, value in after.items() if before.get(name) != value}
        if changed:
            found[tenant] = changed
    return found


def _limits_of(tenant: Tenant | None) -> dict[str, Any]:
    from promptd_client import TenantLimits

    return (TenantLimits() if tenant is None else tenant.limits).model_dump()


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)

"""Requests of admins, written once for both clients. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from promptd_client._job_requests import path_of
from promptd_client._replies import reader
from promptd_client._requests import Call, body_of
from promptd_client.admin_models import ApiKey, Drain, IssuedKey, Tenant, UsageReport

KEYS = "/admin/keys"
TENANTS = "/admin/tenants"
DRAIN = "/admin/drain"


def create_key(
    tenant: str, scopes: Sequence[str] | None, expires_in_seconds: float | None, label: str | None
) -> Call[IssuedKey]:
    """Issue a key. A second one would be another key, so it is not repeated unasked."""
    options: dict[str, Any] = {
        "scopes": None if scopes is None else list(scopes),
        "expires_in_seconds": expires_in_seconds,
        "label": label,
    }
    return Call("POST", KEYS, reader(IssuedKey), body=body_of({"tenant": tenant}, options), is_idempotent=False)


def list_keys(tenant: str | None) -> Call[list[ApiKey]]:
    """List keys, of one tenant or of all."""
    return Call("GET", KEYS, reader(list[ApiKey], "data"), params={} if tenant is None else {"tenant": tenant})


def rotate_key(key_id: str, grace_seconds: float | None) -> Call[IssuedKey]:
    """Issue a successor."""
    body = body_of({}, {"grace_seconds": grace_seconds})
    return Call("POST", path_of(KEYS, key_id, "rotate"), reader(IssuedKey), body=body, is_idempotent=False)


def revoke_key(key_id: str) -> Call[ApiKey]:
    """End a key; twice is as good as once."""
    return Call("DELETE", path_of(KEYS, key_id), reader(ApiKey))


def metrics() -> Call[str]:
    """Scrape the server's counters."""
    return Call("GET", "/metrics", lambda response: response.text)


def engine() -> Call[dict[str, Any]]:
    """Read what one server's engine counts."""
    return Call("GET", "/admin/engine", reader(dict[str, Any]))


def servers() -> Call[list[dict[str, Any]]]:
    """List the servers that share a store."""
    return Call("GET", "/admin/servers", reader(list[dict[str, Any]], "data"))


def list_tenants() -> Call[list[Tenant]]:
    """List the tenants that have keys or limits."""
    return Call("GET", TENANTS, reader(list[Tenant], "data"))


def get_tenant(tenant: str) -> Call[Tenant]:
    """Show one tenant."""
    return Call("GET", path_of(TENANTS, tenant), reader(Tenant))


def set_limits(tenant: str, limits: Mapping[str, float | None]) -> Call[Tenant]:
    """Set some limits; None takes one away. Twice is as good as once."""
    return Call("PATCH", path_of(TENANTS, tenant), reader(Tenant), body=dict(limits))


def erase_tenant(tenant: str) -> Call[dict[str, int]]:
    """Erase a tenant; again finishes what was left."""
    return Call("DELETE", path_of(TENANTS, tenant), reader(dict[str, int], "erased"))


def usage(path: str, tenant: str | None, first_day: str | None, last_day: str | None) -> Call[UsageReport]:
    """Show what was served."""
    params = {"tenant": tenant, "from": first_day, "to": last_day}
    given = {name: value for name, value in params.items() if value is not None}
    return Call("GET", path, reader(UsageReport), params=given)


def drain(method: str) -> Call[Drain]:
    """Start, look at, or take back a server's leaving; each is harmless to repeat."""
    return Call(method, DRAIN, reader(Drain))

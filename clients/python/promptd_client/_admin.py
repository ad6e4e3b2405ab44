"""Keys, tenants and servers, for ordinary code. `AsyncKeys` and `AsyncTenants` are the same for asyncio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from promptd_client import _admin_requests
from promptd_client.admin_models import ApiKey, IssuedKey, Tenant, UsageReport

if TYPE_CHECKING:
    from promptd_client._client import Client

KeyList = list[ApiKey]  # `list` is a method
TenantList = list[Tenant]
ServerList = list[dict[str, Any]]
Erased = dict[str, int]


class Keys:
    """API keys, `client.keys`; needs an admin's key."""

    def __init__(self, client: Client) -> None:
        self._run = client.run

    def create(
        self,
        tenant: str,
        *,
        scopes: Sequence[str] | None = None,
        expires_in_seconds: float | None = None,
        label: str | None = None,
    ) -> IssuedKey:
        """Issue a key; its text is in the answer and nowhere else. Without scopes: all but `admin`."""
        return self._run(_admin_requests.create_key(tenant, scopes, expires_in_seconds, label))

    def list(self, tenant: str | None = None) -> KeyList:
        """List the keys of one tenant, or of all."""
        return self._run(_admin_requests.list_keys(tenant))

    def rotate(self, key_id: str, *, grace_seconds: float | None = None) -> IssuedKey:
        """Issue a successor with the same scopes; the old key works on for the time of grace (a day)."""
        return self._run(_admin_requests.rotate_key(key_id, grace_seconds))

    def revoke(self, key_id: str) -> ApiKey:
        """End a key, everywhere within a second."""
        return self._run(_admin_requests.revoke_key(key_id))


class Tenants:
    """What tenants may use and have used, `client.tenants`; needs an admin's key."""

    def __init__(self, client: Client) -> None:
        self._run = client.run

    def list(self) -> TenantList:
        """List the tenants that have keys or limits."""
        return self._run(_admin_requests.list_tenants())

    def get(self, tenant: str) -> Tenant:
        """Show one tenant."""
        return self._run(_admin_requests.get_tenant(tenant))

    def set(self, tenant: str, **limits: float | None) -> Tenant:
        """Set some of a tenant's limits, everywhere within a second; None takes one away."""
        return self._run(_admin_requests.set_limits(tenant, limits))

    def erase(self, tenant: str) -> Erased:
        """Erase a tenant, everywhere and for ever; return how many of what went."""
        return self._run(_admin_requests.erase_tenant(tenant))

    def usage(
        self, tenant: str | None = None, *, first_day: str | None = None, last_day: str | None = None
    ) -> UsageReport:
        """Show what a tenant, or everybody, was served; days as 2026-11-21 in UTC, without them the last thirty."""
        return self._run(_admin_requests.usage("/admin/usage", tenant, first_day, last_day))


class Fleet:
    """What servers do now, `client.fleet`; all but `metrics` needs an admin's key."""

    def __init__(self, client: Client) -> None:
        self._run = client.run

    def metrics(self) -> str:
        """Read the counters of the server that answers, in Prometheus' text format."""
        return self._run(_admin_requests.metrics())

    def engine(self) -> dict[str, Any]:
        """Read what its engine counts, how it is configured, and whose work it has."""
        return self._run(_admin_requests.engine())

    def servers(self) -> ServerList:
        """List the servers that share its store, and what each does."""
        return self._run(_admin_requests.servers())

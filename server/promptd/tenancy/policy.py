"""Set what a tenant may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from promptd.tenancy.book import Deed
from promptd.tenancy.directory import TenantDirectory
from promptd.tenancy.tenant import Tenant


async def set_limits(directory: TenantDirectory, tenant: str, changes: Mapping[str, Any], *, by: str) -> Tenant:
    """Set some of a tenant's limits, here at once and everywhere within a second; the same again changes nothing."""

    def step(before: Tenant) -> tuple[Tenant, Deed] | None:
        limits = before.limits.changed(changes)
        if limits == before.limits:
            return None
        return replace(before, limits=limits), Deed("limits.set", dict(changes))

    changed = await directory.book.change(tenant, by, step)
    directory.forget(tenant)
    return changed

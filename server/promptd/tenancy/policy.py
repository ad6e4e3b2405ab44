"""Set what a tenant may use, and tell what it holds of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from promptd_store import Put, Store, number_held, quota_key

from promptd.jobs import TRAINING_STEPS, steps_of
from promptd.tenancy.book import Deed
from promptd.tenancy.directory import TenantDirectory
from promptd.tenancy.limits import QUOTAS
from promptd.tenancy.tenant import Tenant


async def set_limits(directory: TenantDirectory, tenant: str, changes: Mapping[str, Any], *, by: str) -> Tenant:
    """Set some of a tenant's limits, here at once and everywhere within a second; the same again changes nothing."""

    def step(before: Tenant) -> tuple[Tenant, Deed] | None:
        limits = before.limits.changed(changes)
        if limits == before.limits:
            return None
        quotas = {quota_key(tenant, what): getattr(limits, limit) for limit, what in QUOTAS.items()}
        puts = [Put(key, b"%d" % value) for key, value in quotas.items() if value is not None]
        gone = [key for key, value in quotas.items() if value is None]
        return replace(before, limits=limits), Deed("limits.set", dict(changes), puts, gone)

    return await directory.change(tenant, by, step)


async def holdings_of(store: Store, tenant: str, day: str) -> dict[str, int]:
    """Return what a tenant holds of what there are quotas for; steps are those of a day."""
    counts = {what: steps_of(day) if what == TRAINING_STEPS else what for what in QUOTAS.values()}
    return {what: max(0, await number_held(store, tenant, count)) for what, count in counts.items()}

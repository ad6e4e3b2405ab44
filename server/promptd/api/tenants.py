"""`/admin/tenants`: what each tenant may use; `/admin/usage` and `/v1/usage`: what it has used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from promptd_store import check_tenant, day_of, scan_tenants
from pydantic import Field

from promptd.api.keys import actor
from promptd.api.schemas import Strict
from promptd.api.services import Services, principal_of, services_of
from promptd.errors import InvalidRequestError
from promptd.tenancy import Counts, Tenant, UsageKey, holdings_of, set_limits
from promptd.tenancy.limits import MAX_LIMIT, MAX_WEIGHT
from promptd.tenancy.uses import DAY_SECONDS

DEFAULT_DAYS = 30
_Limit = Annotated[int, Field(ge=0, le=MAX_LIMIT)] | None
_DAY = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
_From = Annotated[str | None, Query(alias="from", pattern=_DAY)]
_To = Annotated[str | None, Query(alias="to", pattern=_DAY)]
_TenantQuery = Annotated[str | None, Query(min_length=1, max_length=64)]


class LimitsBody(Strict):
    """`PATCH /admin/tenants/{tenant}`: a limit that is given is set, null takes it away, the others stay."""

    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT)] | None = None
    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    max_concurrent_requests: _Limit = None
    max_queued_requests: _Limit = None
    max_resident_bytes: _Limit = None
    max_prompts: _Limit = None
    max_stored_bytes: _Limit = None
    max_training_jobs: _Limit = None
    training_steps_per_day: _Limit = None


async def list_tenants(request: Request) -> Response:
    """List every tenant that has keys or limits, by name."""
    services = services_of(request)
    tenants = await services.tenants.book.list()
    return JSONResponse({"object": "list", "data": [_view(services, tenant) for tenant in tenants]})


async def get_tenant(tenant: str, request: Request) -> Response:
    """Show one tenant and what it holds; of an erased one, which servers have forgotten it."""
    services = services_of(request)
    return await _shown(services, await services.tenants.book.read(check_tenant(tenant)))


async def change_tenant(tenant: str, body: LimitsBody, request: Request) -> Response:
    """Set limits; they hold on every server within a second."""
    services = services_of(request)
    changes = body.model_dump(include=body.model_fields_set)
    changed = await set_limits(services.tenants, tenant, changes, by=actor(principal_of(request)))
    return await _shown(services, changed)


async def own_usage(request: Request, first: _From = None, last: _To = None) -> Response:
    """Show what the caller's tenant was served, by day, key and prompt; without days, the last thirty."""
    return await _usage(services_of(request), [principal_of(request).tenant], first, last)


async def all_usage(request: Request, tenant: _TenantQuery = None, first: _From = None, last: _To = None) -> Response:
    """Show what one tenant, or everybody, was served."""
    services = services_of(request)
    await services.gate.usage.flush()  # a tenant's first counts are its first record
    everybody = scan_tenants(services.catalog.store)
    tenants = [one async for one in everybody] if tenant is None else [check_tenant(tenant)]
    return await _usage(services, tenants, first, last)


async def _usage(services: Services, tenants: Sequence[str], first: str | None, last: str | None) -> Response:
    now = time.time()
    first = first or day_of(now - DEFAULT_DAYS * DAY_SECONDS)
    last = last or day_of(now)
    if first > last:
        raise InvalidRequestError(f"from {first} is after to {last}", param="from")
    found: list[tuple[UsageKey, Counts]] = []
    for tenant in tenants:
        found += await services.gate.usage.read(tenant, first, last)
    total = sum((counts for _, counts in found), Counts())
    data = [{**asdict(key), **asdict(counts)} for key, counts in found]
    return JSONResponse({"object": "list", "from": first, "to": last, "data": data, "total": asdict(total)})


async def _shown(services: Services, tenant: Tenant) -> Response:
    held = await holdings_of(services.catalog.store, tenant.name, day_of(time.time()))
    told = {} if tenant.erased_at is None else {"servers": await services.eraser.servers(tenant.name)}
    return JSONResponse({**_view(services, tenant), "held": held, **told})


def _view(services: Services, tenant: Tenant) -> dict[str, Any]:
    active = tenant.active_keys(services.tenants.book.clock())
    return {
        "id": tenant.name,
        "object": "tenant",
        "limits": asdict(tenant.limits),
        "active_keys": [key.id for key in active],
        "erased": None if tenant.erased_at is None else int(tenant.erased_at),
    }

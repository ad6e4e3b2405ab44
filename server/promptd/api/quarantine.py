"""`/admin/quarantine`: versions of prompts that are not served, because the model's numbers were not finite."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from promptd_store import check_tenant

from promptd.api.keys import actor
from promptd.api.services import principal_of, services_of
from promptd.tenancy import lift


async def list_quarantined(request: Request) -> Response:
    """List the quarantined versions of all tenants, oldest first."""
    tenants = await services_of(request).tenants.book.list()
    found = [(one.at, tenant.name, one) for tenant in tenants for one in tenant.quarantined]
    data = [
        {"object": "prompt.quarantined", "tenant": tenant, "prompt": one.prompt, "version": one.version, "at": int(at)}
        for at, tenant, one in sorted(found, key=lambda row: row[:2])
    ]
    return JSONResponse({"object": "list", "data": data})


async def release_prompt(tenant: str, version: str, request: Request) -> Response:
    """Serve a quarantined version again, on every server within a second."""
    await lift(services_of(request).tenants, check_tenant(tenant), version, by=actor(principal_of(request)))
    return JSONResponse({"object": "prompt.released", "tenant": tenant, "version": version, "released": True})

"""`DELETE /admin/tenants/{tenant}`, `DELETE /v1/users/{user}`: everything of a tenant, or of one of its end users."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from promptd.api.keys import actor
from promptd.api.schemas import User
from promptd.api.services import principal_of, services_of
from promptd.errors import ConflictError


async def erase_tenant(tenant: str, request: Request) -> Response:
    """Erase a tenant: refused at once, gone from the store and every server's memory. Again finishes what was left."""
    services, principal = services_of(request), principal_of(request)
    if tenant == principal.tenant:
        raise ConflictError(f"tenant {tenant!r} is the one whose key asks", param="tenant", code="own_tenant")
    erased = await services.eraser.tenant(tenant, by=actor(principal))
    return JSONResponse({"id": tenant, "object": "tenant.erased", "erased": erased})


async def erase_user(user: User, request: Request) -> Response:
    """Erase the prompts, files and jobs that belong to one end user of the caller's tenant."""
    services, principal = services_of(request), principal_of(request)
    erased = await services.eraser.user(principal.tenant, user, by=actor(principal))
    return JSONResponse({"id": user, "object": "user.erased", "erased": erased})

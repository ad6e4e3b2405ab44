"""`/v1/prompts/{name}/shares`: with whom an owner shares a prompt, who then names it `owner/name`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from promptd_store import PromptChainBrokenError, PromptModelMismatchError, check_tenant

from promptd.api.prompts import own_name
from promptd.api.services import principal_of, services_of
from promptd.errors import ConflictError


async def list_shares(name: str, request: Request) -> Response:
    """List the tenants that the caller shares a prompt with, by name."""
    name, tenant = own_name(name, request), principal_of(request).tenant
    found = await services_of(request).catalog.shares.list(tenant, name)
    return JSONResponse({"object": "list", "data": [_view(name, one) for one in found], "has_more": False})


async def put_share(name: str, tenant: str, request: Request) -> Response:
    """Share a prompt, all its versions and those to come, with another tenant: for use and for reading."""
    name, owner = own_name(name, request), principal_of(request).tenant
    catalog = services_of(request).catalog
    with suppress(PromptModelMismatchError):  # whatever it stands behind, it is not served here
        record = await catalog.resolve(owner, f"{owner}/{name}")
        try:
            await catalog.in_front(check_tenant(tenant), record)
        except PromptChainBrokenError as error:
            raise ConflictError(
                f"{error.message} for {tenant!r}: share that first", param="tenant", code=error.code
            ) from None
    await catalog.shares.add(owner, name, tenant)
    return JSONResponse(_view(name, tenant))


async def delete_share(name: str, tenant: str, request: Request) -> Response:
    """Share a prompt no longer; requests that run already finish."""
    name, owner = own_name(name, request), principal_of(request).tenant
    await services_of(request).catalog.shares.remove(owner, name, tenant)
    return JSONResponse({**_view(name, tenant), "deleted": True})


def _view(name: str, tenant: str) -> dict[str, Any]:
    return {"object": "prompt.share", "prompt": name, "tenant": tenant}

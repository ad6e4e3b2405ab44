"""`GET /admin/audit`: what admins did to tenants, what tenants changed, who was turned away."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from promptd_store import check_tenant

from promptd.api.services import services_of
from promptd.tenancy import read_audit

_MAX_LISTED = 1000


async def list_audit(
    request: Request,
    tenant: Annotated[str | None, Query(min_length=1, max_length=64)] = None,
    after: Annotated[int, Query(ge=0, lt=1 << 63)] = 0,
    limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = 100,
    kind: Annotated[Literal["deeds", "calls"], Query()] = "deeds",
) -> Response:
    """List deeds of admins, oldest first, of one tenant or of all; `after` is the seq of the last one seen.

    For one tenant `intact` tells whether its whole log is what was written: no entry changed, missing or added.
    `kind=calls` lists calls that changed something, and those that were refused, which are counted.
    """
    services = services_of(request)
    name = None if tenant is None else check_tenant(tenant)
    if kind == "calls":
        calls = await services.calls.read(name, after=after, limit=limit + 1)
        listed = [{"seq": seq, **entry} for seq, entry in calls[:limit]]
        return JSONResponse({"object": "list", "data": listed, "has_more": len(calls) > limit, "intact": None})
    found = await read_audit(services.catalog.store, name, after=after, limit=limit + 1)
    data = [{"seq": seq, **asdict(entry)} for seq, entry in found[:limit]]
    intact = None if name is None else await services.tenants.book.is_intact(name)
    return JSONResponse({"object": "list", "data": data, "has_more": len(found) > limit, "intact": intact})

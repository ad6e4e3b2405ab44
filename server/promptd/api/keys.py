"""`/admin/keys`: issue, list, rotate and revoke API keys."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from promptd_store import check_tenant
from pydantic import Field

from promptd.api.schemas import Strict
from promptd.api.services import Services, principal_of, services_of
from promptd.errors import ConflictError
from promptd.tenancy import DEFAULT_GRACE_SECONDS, TENANT_SCOPES, Issued, KeyOffice, KeyRecord, Principal, Scope

MAX_KEY_SECONDS = 10 * 365 * 86400.0
TenantName = Annotated[str, Field(min_length=1, max_length=64)]
ScopeName = Annotated[str, Field(max_length=32)]
Seconds = Annotated[float, Field(gt=0, le=MAX_KEY_SECONDS)]


class KeyBody(Strict):
    """`POST /admin/keys`; without scopes the key may do everything but administrate."""

    tenant: TenantName
    scopes: Annotated[list[ScopeName], Field(min_length=1, max_length=len(Scope))] = sorted(TENANT_SCOPES)
    expires_in_seconds: Seconds | None = None
    label: Annotated[str, Field(max_length=128)] = ""


class RotateBody(Strict):
    """`POST /admin/keys/{key_id}/rotate`."""

    grace_seconds: Annotated[float, Field(ge=0, le=MAX_KEY_SECONDS)] = DEFAULT_GRACE_SECONDS


async def create_key(body: KeyBody, request: Request) -> Response:
    """Issue a key. The answer is the only place where it ever stands in the clear."""
    office = _office(services_of(request))
    issued = await office.issue(
        body.tenant,
        body.scopes,
        by=actor(principal_of(request)),
        expires_in_seconds=body.expires_in_seconds,
        label=body.label,
    )
    return JSONResponse(_issued(office, issued))


async def list_keys(
    request: Request, tenant: Annotated[str | None, Query(min_length=1, max_length=64)] = None
) -> Response:
    """List keys by tenant, ended ones too; none in the clear."""
    office = _office(services_of(request))
    found = await office.list(None if tenant is None else check_tenant(tenant))
    return JSONResponse({"object": "list", "data": [_view(office, owner, key) for owner, key in found]})


async def rotate_key(key_id: str, body: RotateBody, request: Request) -> Response:
    """Issue a successor; the old key works until the time of grace is over."""
    office = _office(services_of(request))
    issued = await office.rotate(key_id, by=actor(principal_of(request)), grace_seconds=body.grace_seconds)
    return JSONResponse(_issued(office, issued))


async def revoke_key(key_id: str, request: Request) -> Response:
    """End a key on every server within a second."""
    office = _office(services_of(request))
    tenant, key = await office.revoke(key_id, by=actor(principal_of(request)))
    return JSONResponse(_view(office, tenant, key))


def actor(principal: Principal) -> str:
    """Name who does something, for the audit log."""
    return f"{principal.tenant}/{principal.key_id}"


def _office(services: Services) -> KeyOffice:
    if services.keys.is_open:
        raise ConflictError(
            "this server needs no keys, so none can be made: start it with PROMPTD_ADMIN_KEY", code="server_is_open"
        )
    return services.key_office


def _view(office: KeyOffice, tenant: str, key: KeyRecord) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "api_key",
        "tenant": tenant,
        "scopes": [scope.value for scope in key.scopes],
        "label": key.label,
        "state": office.state(key),
        "created": int(key.created_at),
        "expires": None if key.expires_at is None else int(key.expires_at),
        "revoked": None if key.revoked_at is None else int(key.revoked_at),
    }


def _issued(office: KeyOffice, issued: Issued) -> dict[str, Any]:
    return {"key": issued.key.text, **_view(office, issued.tenant, issued.record)}

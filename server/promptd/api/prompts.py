"""`/v1/prompts`: upload, list, read, roll back, delete."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import zipfile
from typing import Annotated, Any, Literal

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from promptd_store import PromptRecord, to_peft

from promptd.api.auth import Scope, authorize
from promptd.api.schemas import RollbackBody
from promptd.api.services import principal_of, services_of
from promptd.engine.neighbors import neighbors
from promptd.errors import InvalidRequestError, PayloadTooLargeError

_MAX_CONFIG_CHARS = 24 << 10
_MAX_LISTED = 100
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the archive's bytes depend on its content alone


def describe(record: PromptRecord) -> dict[str, Any]:
    """A record as the API shows it."""
    return {
        "id": record.name,
        "object": "prompt",
        "owned_by": record.tenant,
        "version": record.version,
        "number": record.number,
        "is_current": record.is_current,
        "kind": record.kind.value,
        "num_virtual_tokens": record.num_virtual_tokens,
        "num_bytes": record.num_bytes,
        "base_fingerprint": record.base_fingerprint,
        "verified": record.verified,
        "visibility": record.visibility,
        "created": record.created_at,
        "provenance": dict(record.provenance),
        "manifest": dict(record.manifest),
    }


def _respond(record: PromptRecord, status_code: int = 200) -> JSONResponse:
    return JSONResponse(describe(record), status_code=status_code, headers={"ETag": f'"{record.etag}"'})


async def put_prompt(
    name: str,
    request: Request,
    kind: Annotated[Literal["soft", "prefix", "text"] | None, Query()] = None,
    num_virtual_tokens: Annotated[int | None, Query(ge=1, le=1 << 20)] = None,
    visibility: Annotated[Literal["private", "public"], Query()] = "private",
) -> Response:
    """Publish a version: the body is a safetensors file, native or from PEFT.

    A PEFT `adapter_config.json` may travel in the header `X-Promptd-Adapter-Config`, base64url-coded.
    """
    services, principal = services_of(request), principal_of(request)
    if visibility == "public":
        authorize(principal, Scope.ADMIN)
    content = await _read(request, services.limits.max_upload_bytes)
    record = await services.catalog.publish(
        principal.tenant,
        name,
        content,
        if_match=_unquote(request.headers.get("if-match")),
        if_none_match=_unquote(request.headers.get("if-none-match")),
        kind=kind,
        num_virtual_tokens=num_virtual_tokens,
        adapter_config=_adapter_config(request.headers.get("x-promptd-adapter-config")),
        visibility=visibility,
    )
    return _respond(record, 201 if record.number == 1 else 200)


async def list_prompts(
    request: Request,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = _MAX_LISTED,
) -> Response:
    """List the caller's prompts and the public ones, by name."""
    services, principal = services_of(request), principal_of(request)
    records = await services.catalog.list(principal.tenant, include_public=True)
    names = [record.name for record in records]
    start = names.index(after) + 1 if after in names else 0
    page = records[start : start + limit]
    return JSONResponse(
        {
            "object": "list",
            "data": [describe(record) for record in page],
            "has_more": start + limit < len(records),
        }
    )


async def get_prompt(name: str, request: Request) -> Response:
    """Read one prompt; `name@2` and `name@sha256:…` name a version."""
    return _respond(await _resolve(name, request))


async def list_versions(name: str, request: Request) -> Response:
    """List every version of an own prompt, newest first."""
    records = await services_of(request).catalog.versions(principal_of(request).tenant, name)
    return JSONResponse({"object": "list", "data": [describe(record) for record in records], "has_more": False})


async def get_content(
    name: str, request: Request, format: Annotated[Literal["native", "peft"], Query()] = "native"
) -> Response:
    """Download: `native` is the file as stored; `peft` a zip of adapter_config.json and adapter_model.safetensors."""
    services = services_of(request)
    record = await _resolve(name, request)
    artifact = await services.catalog.load(record)
    headers = {"ETag": f'"{record.version}"', "X-Promptd-Version": record.version}
    if format == "native":
        return Response(artifact.content, media_type="application/octet-stream", headers=headers)
    config, weights = await asyncio.to_thread(
        to_peft, artifact, spec=services.model.spec, base_model_name_or_path=services.model.served_name
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        for filename, data in (("adapter_config.json", config), ("adapter_model.safetensors", weights)):
            zipped.writestr(zipfile.ZipInfo(filename, _ZIP_TIME), data)
    return Response(archive.getvalue(), media_type="application/zip", headers=headers)


async def roll_back(name: str, body: RollbackBody, request: Request) -> Response:
    """Point the name to an earlier version."""
    record = await services_of(request).catalog.rollback(
        principal_of(request).tenant, name, body.to, if_match=_unquote(request.headers.get("if-match"))
    )
    return _respond(record)


async def delete_prompt(name: str, request: Request) -> Response:
    """Delete a prompt with all its versions."""
    await services_of(request).catalog.delete(
        principal_of(request).tenant, name, if_match=_unquote(request.headers.get("if-match"))
    )
    return JSONResponse({"id": name, "object": "prompt.deleted", "deleted": True})


async def get_neighbors(name: str, request: Request, count: Annotated[int, Query(ge=1, le=20)] = 5) -> Response:
    """Show the vocabulary entries nearest to each virtual token of a soft prompt."""
    services = services_of(request)
    record = await _resolve(name, request)
    artifact = await services.catalog.load(record)
    found = await asyncio.to_thread(neighbors, services.model, artifact, count)
    data = [
        {
            "index": index,
            "neighbors": [{"token_id": n.token_id, "token": n.token, "cosine": n.cosine} for n in row],
        }
        for index, row in enumerate(found)
    ]
    return JSONResponse({"object": "list", "version": record.version, "data": data})


async def _resolve(name: str, request: Request) -> PromptRecord:
    principal = principal_of(request)
    record = await services_of(request).catalog.resolve(principal.tenant, name)
    authorize(principal, Scope.PROMPTS_READ, record)
    return record


async def _read(request: Request, limit: int) -> bytes:
    """Read the body, stopping at the limit, whatever Content-Length claims."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequestError("uploads take no Content-Encoding", param="content-encoding")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise PayloadTooLargeError(f"the file is larger than {limit} bytes", param="body")
    return bytes(content)


def _adapter_config(header: str | None) -> bytes | None:
    if header is None:
        return None
    if len(header) > _MAX_CONFIG_CHARS:
        raise PayloadTooLargeError("adapter_config.json is larger than 16 KiB", param="x-promptd-adapter-config")
    try:
        config = base64.urlsafe_b64decode(header.encode() + b"=" * (-len(header) % 4))
        json.loads(config)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(
            f"X-Promptd-Adapter-Config is not base64url-coded JSON: {error}", param="x-promptd-adapter-config"
        ) from error
    return config


def _unquote(etag: str | None) -> str | None:
    """Read an entity tag: `"abc"`, `W/"abc"` or `*`."""
    return None if etag is None else etag.removeprefix("W/").strip().strip('"')
